"""The checkpoint folder: find it, load it, save it.

    model, tokenizer = load("mini")                            # or a hub id, or any such folder
    tokens = tokenizer.chat([{"role": "user", "content": "Hi"}])
    hidden = model(torch.tensor([tokens]))                     # (1, T, C)
    save("out/copy", model, tokenizer)                         # transformers and vLLM load it unchanged

A folder is Hugging Face's: config.json, tokenizer.json, tokenizer_config.json, model.safetensors or shards
with an index. Only safetensors are read, no code of a folder is run, and its chat template only in a sandbox.

Left out: other weight formats (pytorch_model.bin, GGUF), quantised weights, adapters.
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.tokenizer import TOKENIZER_FILES, Tokenizer
from kernels import uses_triton
from model import Config, Transformer
from run.command import UserError, say
from run.files import file_fingerprint, fingerprint, read_json, write_whole
from run.tensors import open_tensors, read_tensors, save_tensors

# ---- config.json ---------------------------------------------------------------------------------
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


WANTED = {int: "a whole number above 0", float: "a number above 0", bool: "true or false", dict: "an object"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Reader:
    """Values of a JSON object. Raises UserError, naming file and key, for one that is not of the `kind`."""
    source: dict
    name: str | Path

    def __call__(self, key: str, kind: type, default=None):
        """A null counts as missing, except for a float: a null rotary base is an error."""
        value = self.source.get(key)
        if value is None and not (kind is float and key in self.source):
            value = default
        if value is None and key not in self.source:
            raise UserError(f"{self.name}: the key {key!r} is missing")
        numeric = kind in (int, float) and type(value) in (int, kind)
        fits = 0 < value < 2**28 if numeric else type(value) is kind  # a product of two fits 64 bits
        if not fits:
            raise UserError(f"{self.name}: {key} must be {WANTED[kind]}, not {value!r}")
        return kind(value)


def config_of(source: dict, name: str | Path = "config.json") -> Config:
    """The Config of what a config.json holds.

    Raises UserError, naming the file, for what this program cannot run.
    """
    read = Reader(source, name)
    family = source.get("model_type")
    if family not in ("qwen2", "qwen3", "llama"):
        raise UserError(f"{name}: model_type {family!r} is not supported; "
                        "this program knows qwen2 (and 2.5), qwen3 and llama (and SmolLM2)")
    other_activation = source.get("hidden_act", "silu") != "silu"
    if has_sliding_window(read) or read("mlp_bias", bool, False) or other_activation:
        raise UserError(f"{name}: use_sliding_window, mlp_bias and activations other than silu are not "
                        "supported")

    # The settings of the rotary embedding: one dict in transformers 5, two keys before.
    rope = {**read("rope_scaling", dict, {}), **read("rope_parameters", dict, {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{name}: rotary scaling {rope_type!r} is not supported (only default and llama3)")
    read_rope = Reader(rope, name)
    scaling = {key: read_rope(key, float) for key in LLAMA3_SCALING} if rope_type == "llama3" else None

    sizes = {key: read(key, int) for key in SIZES}
    heads = sizes["num_attention_heads"]
    kv_heads = read("num_key_value_heads", int, heads)
    head_dim = read("head_dim", int, 128 if family == "qwen3" else sizes["hidden_size"] // heads)
    if heads % kv_heads or head_dim % 2:
        raise UserError(f"{name}: {kv_heads} key/value heads must divide {heads} heads, "
                        f"and the head_dim {head_dim} must be even")
    bias = read("attention_bias", bool, False)
    return Config(
        **sizes,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=family == "qwen2" or bias,
        o_bias=family != "qwen2" and bias,
        qk_norm=family == "qwen3",
        tie_word_embeddings=read("tie_word_embeddings", bool, False),
        rms_norm_eps=read("rms_norm_eps", float, 1e-6),
        max_position_embeddings=read("max_position_embeddings", int, 2048),
        rope_theta=(read_rope if "rope_theta" in rope else read)("rope_theta", float, 10000.0),
        rope_llama3=scaling,
        source=source,
    )


def has_sliding_window(read: Reader) -> bool:
    """Whether some layer has a sliding window, as transformers reads it."""
    kinds = read.source.get("layer_types")
    if isinstance(kinds, list):
        return any(kind != "full_attention" for kind in kinds)
    windowed = read("use_sliding_window", bool, False) and read.source.get("sliding_window") is not None
    return windowed and read("max_window_layers", int, 28) < read("num_hidden_layers", int)


# ---- finding and loading a folder ----------------------------------------------------------------
def find_folder(model: str | Path) -> Path:
    """The local folder of a model: itself, or the hub's, fetched with huggingface_hub.

    The only code that uses the network.
    """
    name = str(model)
    if name.rstrip("/") == "mini":  # the one that ships with the project, wherever the command is started
        return Path(__file__).parent.parent / "mini"
    if Path(model).is_dir():
        return Path(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"--model {name}: no such folder (a hub id looks like Qwen/Qwen2.5-1.5B-Instruct)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    wanted = ["config.json", "adapter_config.json", *TOKENIZER_FILES, "*.safetensors",
              "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    # ValueError: not a valid hub id.
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"--model {name}: no such folder here, "
                        f"and it could not be fetched from the hub ({reason})") from e


def files_of_weights(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that the index lists."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise UserError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there "
                        "(weights in other formats are not read)")
    shards = Reader(read_json(index), index)("weight_map", dict).values()
    for shard in shards:
        if not isinstance(shard, str):
            raise UserError(f"{index}: weight_map must give the file of each tensor")
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{index}: the shard {shard!r} lies outside the folder; it is not read")
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard}: no such file, but the index lists it; fetch the folder again")
    return [folder / shard for shard in sorted(set(shards))]


def model_fingerprint(model: str | Path) -> str:
    """The fingerprint of the files of a model folder that decide what the model computes."""
    folder = find_folder(model)
    names = ("config.json", *TOKENIZER_FILES, "model.safetensors.index.json")
    there = [folder / name for name in names if (folder / name).is_file()]
    there += files_of_weights(folder)
    return fingerprint("".join(path.name + file_fingerprint(path) for path in there))


CONSTANTS = "rotary_emb.inv_freq"  # old folders hold them; they follow from the config


def read_shapes(files: list[Path]) -> dict[str, tuple]:
    """{name: shape} of all tensors, read from the headers of the files."""
    shapes = {}
    for path in files:
        with open_tensors(path) as f:
            for name in f.keys():  # noqa: SIM118 (a safetensors file is not a dict)
                if not name.endswith(CONSTANTS):
                    shapes[name] = tuple(f.get_slice(name).get_shape())
    return shapes


def read_weights(files: list[Path], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """{name: tensor} of all tensors. Floating-point ones are converted to `dtype`."""
    weights = {}
    for path in files:
        for name, w in read_tensors(path):
            if not name.endswith(CONSTANTS):
                weights[name] = w.to(device, dtype) if w.is_floating_point() else w
    return weights


def read_config(folder: Path) -> Config:
    """The Config of a folder. Raises UserError for a folder that this program cannot read."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: an adapter, not a whole model; merge it into its base first "
                        "(merge_and_unload of peft)")
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; --model must be a folder in Hugging Face format")
    source = read_json(path)
    if source.get("quantization_config") is not None:
        raise UserError(f"{path}: quantization_config means quantised weights; take the model that is not "
                        "quantised")
    return config_of(source, path)


def read_folder(
    model: str | Path, template_kwargs: dict | None = None,
) -> tuple[Path, Config, Tokenizer]:
    """All of a folder but its weights, whose shapes are checked. Raises UserError for anything wrong in it.

    `template_kwargs` go to the chat template; None takes those of the run that made the folder, if one did.
    """
    folder = find_folder(model)
    config = read_config(folder)
    check_shapes(folder, config, read_shapes(files_of_weights(folder)))
    record = folder / "run.json"
    if template_kwargs is None and record.is_file():
        flags = Reader(read_json(record), record)("flags", dict, {})
        template_kwargs = Reader(flags, record)("chat_template_kwargs", dict, {}) or None
    return folder, config, Tokenizer(folder, template_kwargs, rows=config.vocab_size)


def load(
    model: str | Path, device: str = "auto", dtype: str = "auto", template_kwargs: dict | None = None,
    on_host: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """(Transformer, Tokenizer) of a Hugging Face folder or hub id, as `read_folder` reads it.

    `on_host` leaves the weights in main memory, mapped from their files, for `optimizer.shard` to take from.
    """
    device, dtype = device_and_dtype(device, dtype)
    folder, config, tokenizer = read_folder(model, template_kwargs)
    if not tokenizer.has_template:
        say(f"{folder} has no chat template; it gets ChatML, where <|im_end|> ends a turn")
    if tokenizer.template_kwargs and template_kwargs is None:
        kwargs = json.dumps(tokenizer.template_kwargs)
        say(f"{folder}: --chat-template-kwargs '{kwargs}', as its run.json says")
    for name in sorted((tokenizer.template_kwargs or {}).keys() - tokenizer.template.names):
        say(f"{folder}: its chat template does not look at {name!r} of --chat-template-kwargs")
    weights = read_weights(files_of_weights(folder), torch.device("cpu") if on_host else device, dtype)
    with torch.device("meta"):
        transformer = Transformer(config)
    if config.tie_word_embeddings:
        drop_tied_head(folder, weights)
    for name, w in weights.items():
        if not w.is_floating_point():
            raise UserError(f"{folder}: {name} holds {w.dtype}, as quantised weights do, which are not read")
    transformer.load_state_dict(weights, strict=True, assign=True)
    transformer.frequencies = transformer.frequencies.to(device)
    transformer.vocab = min(tokenizer.size, config.vocab_size)
    if transformer.is_miniature and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a second one costs more than it brings
    return transformer, tokenizer


def drop_tied_head(folder: Path, weights: dict[str, Tensor]) -> None:
    """Drop the second copy of a tied head, which some folders have. Raises UserError if it differs."""
    head = weights.pop("lm_head.weight", None)
    embedding = weights.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    if head.shape != embedding.shape or not torch.equal(head.to(embedding.dtype), embedding):
        raise UserError(f"{folder}: config.json ties the head to the embedding, but there is an "
                        'lm_head.weight of its own; to use it, say "tie_word_embeddings": false')


def check_shapes(folder: Path, config: Config, shapes: dict[str, tuple]) -> None:
    """Raises UserError that names the tensors which are missing, unexpected or of another shape."""
    if config.num_hidden_layers > len(shapes):
        raise UserError(f"{folder}: the weights do not fit config.json: num_hidden_layers is "
                        f"{config.num_hidden_layers}, but there are {len(shapes)} tensors")
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        model = Transformer(config)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as e:
        reasons = "; ".join(line.strip()[:200] for line in str(e).splitlines()[1:4])
        raise UserError(f"{folder}: the weights do not fit config.json: {reasons}") from e


def device_and_dtype(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """The torch device and dtype that the flags --device and --dtype mean."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # under torchrun each process of a host has its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: give cpu, cuda or cuda:N")
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: torch finds no GPU here; use --device cpu")
        if found.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: there are only {torch.cuda.device_count()} GPUs here, "
                            "counted from 0")
        torch.cuda.set_device(found)
    if dtype == "auto":
        dtype = "bfloat16" if found.type == "cuda" else "float32"
    dtype = getattr(torch, dtype)
    try:
        uses_triton(found, dtype)  # refuses a wrong KERNELS now, before anything is written
    except ValueError as e:
        raise UserError(str(e)) from e
    return found, dtype


# ---- saving a folder -----------------------------------------------------------------------------
def save(
    path: str | Path, model: Transformer, tokenizer: Tokenizer,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a Hugging Face folder that transformers and vLLM load unchanged.

    Each file appears whole or not at all. `weights` are the model's, where it is sharded and has only parts.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    weights = weights or dict(model.named_parameters())
    save_tensors(path / "model.safetensors", weights)
    for name, content in tokenizer.files.items():
        if name != "generation_config.json":
            write_whole(path / name, content)
    # Engines stop where generation_config.json says. A base model's names the end of a document, not that of
    # a turn, so our stop ids go in. Its temperature and penalties, which engines apply in silence, stay out:
    # the model was trained without them.
    source = json.loads(tokenizer.files.get("generation_config.json", b"{}"))
    generation = {name: source[name] for name in ("bos_token_id", "pad_token_id") if name in source}
    generation["eos_token_id"] = tokenizer.stop_ids
    write_whole(path / "generation_config.json", json.dumps(generation, indent=2))
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = {**model.config.source, "torch_dtype": dtype}
    # transformers 5's name for torch_dtype goes, or the two could disagree.
    config.pop("dtype", None)
    write_whole(path / "config.json", json.dumps(config, indent=2))
