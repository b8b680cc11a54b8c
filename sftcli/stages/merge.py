"""sft merge: a base and its adapter -> one model folder."""

from sftcli import artifacts, console, writing
from sftcli.errors import CheckpointError, UsageError
from sftcli.model.adapters.lora import merge as merge_updates
from sftcli.model.adapters.peft import LoraAdapter, apply, open_adapter, trained_on_another
from sftcli.model.checkpoint import DTYPES, SHARD_SIZE, load_trained, open_folder, save_model
from sftcli.model.tensorfile import bytes_of
from sftcli.text.folder import folder_template, stop_ids


def merge(
    adapter: str, output: str, model: str | None = None, dtype: str | None = None, shard_size: str = SHARD_SIZE
) -> None:
    """Write base + adapter as a model folder: added in float32, cast once."""
    place = artifacts.adapter_folder(adapter)
    if place is None:
        raise CheckpointError(f"{adapter} is no adapter: no {artifacts.ADAPTER_CONFIG} in it")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    bytes_of(shard_size)
    base, _ = artifacts.model_and_adapter(model or str(place))
    folder = open_folder(base)
    found = open_adapter(str(place), folder)
    if not isinstance(found, LoraAdapter):
        raise UsageError(f"{adapter} is a prefix, which no weights can hold", hint=f"-m BASE --adapter {adapter}")
    with writing.output_folder(output) as target:
        if trained_on_another(found, folder):
            console.warn(f"merge: {adapter} was trained on another model than {base}")
        network = load_trained(folder)
        apply(network, found)
        merge_updates(network)
        if network.config.tied != folder.config.tied:  # embedding and head were trained apart
            folder.json["tie_word_embeddings"] = network.config.tied
        kind = DTYPES[dtype] if dtype else None
        save_model(network, folder, target, stop_ids(place), folder_template(place), kind, shard_size)
    held = str(kind or folder.dtype).removeprefix("torch.")
    console.note(f"merge: {base} and {place}, {len(found.sites)} layers changed, in {held}; wrote {output}")
