"""The plugin of vLLM: requests served by an unchanged vLLM are decoded under control.

vLLM calls `register` (entry point `vllm.general_plugins`) in each of its processes: the front end, the engine and the workers.
The bank of value functions and the control of requests that carry none come from the environment (`settings`). Requests are
checked where they are admitted (`admission`); states are edited in the workers, where they enter the logits (`steering`).
"""


def register() -> None:
    """Put the plugin in place in this process; called by vLLM, maybe several times.

    Raises:
        ValueError, OSError: RECONTROL_BANK or RECONTROL_DEFAULT is invalid; vLLM does not start.
        ImportError, RuntimeError: this release of vLLM lacks what the plugin needs; vLLM does not start.
    """
    # Only here: the package is imported where there is no vLLM, too.
    from recontrol.vllm_plugin import admission, steering
    from recontrol.vllm_plugin.settings import Settings

    settings = Settings.from_environment()
    # Without a bank as well: a request that asks for control is then refused, not served without.
    admission.install(settings)
    if settings.bank is not None:
        steering.install(settings)
