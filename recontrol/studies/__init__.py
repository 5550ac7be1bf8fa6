"""Studies: methods compared on one model, data set and reward, from the first rollout to the report, as one YAML file says."""
