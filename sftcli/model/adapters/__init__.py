"""What is trained beside a frozen model: applied to it from outside, stored in PEFT's files."""

from sftcli.model.adapters import lora, prefix
from sftcli.model.families import Family
from sftcli.model.gpt import GPT
from sftcli.recipe import Adapter, Lora


def adapt(model: GPT, family: Family, options: Adapter, seed: int) -> None:
    """Freeze the model and let only an adapter train."""
    if isinstance(options, Lora):
        lora.adapt(model, family, options, seed)
    else:
        prefix.adapt(model, options, seed)
