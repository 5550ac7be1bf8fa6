"""Results of an evaluation that nobody has run, for tests of what is made of them."""

from recontrol.evaluation.measure import Answer, likelihoods
from recontrol.evaluation.results import Result
from recontrol.methods.base import Training


def result(step_size=0.5, steps=30, rewards=(0.0,), **changes):
    """RE-Control by this setting, or with no steps the uncontrolled model, with one response for each reward."""
    mean = sum(rewards) / len(rewards)
    kind = "RE-Control" if steps else "uncontrolled"
    texts = [f"réponse {index}" for index in range(len(rewards))]
    kls = [step_size * steps / 10 + index / 100 for index in range(len(rewards))]
    answers = [
        Answer(text, 3, "length", [reward], 0.9, 0.4, 12.0, kl, [0.0, 0.5, step_size], ["ré", "po", text[4:]])
        for text, reward, kl in zip(texts, rewards, kls, strict=True)
    ]
    fields = {
        "method": f"{kind} (alpha {step_size:g}, n {steps})" if steps else kind,
        "kind": kind,
        "settings": {"alpha": step_size, "n": steps} if steps else {},
        "seeds": 1,
        "reward": mean,
        "reward_interval": (mean - 0.5, mean + 0.5),
        "head_rewards": [],
        "diversity": 0.91,
        "coherence": 0.42,
        "nll": 4.2 + step_size,
        "perplexity": 70.0,
        "kl": sum(kls) / len(kls),
        "kl_interval": (min(kls), max(kls)),
        "length": 47.5,
        "tokens_per_second": 1234.5,
        "cost": 1.0 + step_size / 10,
        "added_seconds": step_size / 1000,
        "peak_bytes": 2**20,
        "edit_norm": 3.25 if steps else None,
        "value_end": step_size,
        "training": Training(1000, 2.5, 2**21) if steps else Training(),
        "rewards": list(rewards),
        "kls": kls,
        "responses": texts,
        "answers": answers,
    }
    return Result(step_size=step_size, steps=steps, **{**fields, **changes})


def response_nll(model, tokenizer, prompts, token_ids, **options):
    """Nats a token, over all tokens of all responses."""
    found = likelihoods(model, tokenizer, prompts, token_ids, **options)
    count = sum(map(len, token_ids))
    return sum(each.nll for each in found) / count if count else float("nan")
