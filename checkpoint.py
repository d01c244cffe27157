"""The tokenizer with its chat format, and the checkpoint folder: find it, load it, save it.

    model, tokenizer = load("mini")                            # or a hub id, or any such folder
    tokens = tokenizer.chat([{"role": "user", "content": "Hi"}])
    hidden = model(torch.tensor([tokens]))                     # (1, T, C)
    save("out/copy", model, tokenizer)                         # transformers and vLLM load it unchanged

A folder is Hugging Face's: config.json, tokenizer.json, tokenizer_config.json, model.safetensors or shards
with an index. Only safetensors are read, and no code of a folder is run.

Left out: other weight formats (pytorch_model.bin, GGUF), quantised weights, adapters, slow tokenizers.
"""
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as BPE
from torch import Tensor

from cli import UserError, write_whole
from kernels import uses_triton
from model import Config, Transformer

# ---- text and ids --------------------------------------------------------------------------------
# The system turn that a family's template adds when the user gives none, recognised by its text: the template
# is never run. The order matters: the last is a part of the first.
DEFAULT_SYSTEMS = (
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are a helpful assistant.",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)


class Tokenizer:
    """Text to ids and back, and the chat format of the model's family (ChatML, or Llama 3's headers).

    `stop_ids` end a response; `end_id` is the one of them that closes an assistant turn, which SFT teaches.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: tokenizer.json is missing; "
                            "--model must be a folder in Hugging Face format with a fast tokenizer")
        self.files = {}
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                self.files[name] = (folder / name).read_bytes()
        try:
            self.bpe = BPE.from_str(self.files["tokenizer.json"].decode())
            config = json.loads(self.files.get("tokenizer_config.json", b"{}"))
            generation = json.loads(self.files.get("generation_config.json", b"{}"))
            if not isinstance(config, dict) or not isinstance(generation, dict):
                raise ValueError("tokenizer_config.json and generation_config.json must hold objects")
        except Exception as e:  # the tokenizers library raises bare Exception
            raise UserError(f"{folder}: the tokenizer cannot be read ({str(e).splitlines()[0]})") from e
        self.bpe.no_padding()
        self.bpe.no_truncation()
        # The library's name for: encode their text as ordinary text. <|im_end|> in a question ends no turn.
        self.bpe.encode_special_tokens = True
        self.size = max(self.bpe.get_vocab(with_added_tokens=True).values()) + 1

        chatml = self.bpe.token_to_id("<|im_start|>") is not None
        self.llama = not chatml and self.bpe.token_to_id("<|start_header_id|>") is not None
        if not chatml and not self.llama:
            raise UserError(f"{folder}: the tokenizer has neither <|im_start|> (ChatML) nor "
                            "<|start_header_id|> (Llama 3), so no chat format fits it")
        template = str(config.get("chat_template") or "")
        template += self.files.get("chat_template.jinja", b"").decode()
        self.has_dates = "Cutting Knowledge Date" in template  # Llama 3.1 and later
        self.default_system = next((text for text in DEFAULT_SYSTEMS if text in template), None)
        self.end_id = self.bpe.token_to_id("<|eot_id|>" if self.llama else "<|im_end|>")
        self.stop_ids = sorted({self.end_id, *self._eos_of(config, generation)})

    def _eos_of(self, config: dict, generation: dict) -> list[int]:
        """The end tokens that the folder's files name: some give ids, some a text."""
        ids = generation.get("eos_token_id") or []
        if not isinstance(ids, list):
            ids = [ids]
        named = config.get("eos_token")
        if isinstance(named, dict):
            named = named.get("content")
        if named and self.bpe.token_to_id(named) is not None:
            ids = [*ids, self.bpe.token_to_id(named)]
        return ids

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(list(ids), skip_special_tokens=False)

    def text(self, ids: list[int]) -> str:
        """The text of a completion: what `decode` gives, less the stop token at its end."""
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return self.decode(ids)

    def chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation, up to and with the opening of the assistant's turn.

        Text between two special tokens is encoded as one string, as the templates do.

        chat([{"role": "user", "content": "Hi"}]) for ChatML without a default system turn:
        <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
        """
        return self._llama3(messages) if self.llama else self._chatml(messages)

    def _chatml(self, messages: list[dict]) -> list[int]:
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        start = self.bpe.token_to_id("<|im_start|>")
        newline = self.encode("\n")
        ids = []
        for message in messages:
            ids += [start, *self.encode(f"{message['role']}\n{message['content']}"), self.end_id, *newline]
        return ids + [start, *self.encode("assistant\n")]

    def _llama3(self, messages: list[dict]) -> list[int]:
        turns = [(message["role"], message["content"].strip()) for message in messages]
        if self.has_dates:  # the template always opens with two dates; the second is its fixed fallback
            system = turns.pop(0)[1] if turns[0][0] == "system" else ""
            dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"
            turns.insert(0, ("system", f"{dates}\n\n{system}"))
        start = self.bpe.token_to_id("<|start_header_id|>")
        end_of_header = self.bpe.token_to_id("<|end_header_id|>")
        ids = [self.bpe.token_to_id("<|begin_of_text|>")]
        for role, text in turns:
            ids += [start, *self.encode(role), end_of_header, *self.encode("\n\n" + text), self.end_id]
        return ids + [start, *self.encode("assistant"), end_of_header, *self.encode("\n\n")]


# ---- config.json ---------------------------------------------------------------------------------
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_of(source: dict, name: str | Path = "config.json") -> Config:
    """The Config of what a config.json holds.

    Raises UserError, naming the file, for what this program cannot run.
    """
    try:
        return _config_of(source, name)
    except KeyError as e:
        raise UserError(f"{name}: the key {e.args[0]!r} is missing") from e
    except (TypeError, AttributeError, ZeroDivisionError) as e:
        raise UserError(f"{name}: not the configuration of a model (a value has the wrong type)") from e


def _config_of(source: dict, name: str | Path) -> Config:
    family = source.get("model_type")
    if family not in ("qwen2", "qwen3", "llama"):
        raise UserError(f"{name}: model_type {family!r} is not supported; "
                        "this program knows qwen2 (and 2.5), qwen3 and llama (and SmolLM2)")
    other_activation = source.get("hidden_act", "silu") != "silu"
    if source.get("use_sliding_window") or source.get("mlp_bias") or other_activation:
        raise UserError(f"{name}: use_sliding_window, mlp_bias and activations other than silu are not "
                        "supported")

    # The settings of the rotary embedding: one dict in transformers 5, two keys before.
    rope = {**(source.get("rope_scaling") or {}), **(source.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{name}: rotary scaling {rope_type!r} is not supported (only default and llama3)")

    heads = source["num_attention_heads"]
    bias = source.get("attention_bias", False)
    return Config(
        vocab_size=source["vocab_size"],
        hidden_size=source["hidden_size"],
        intermediate_size=source["intermediate_size"],
        num_hidden_layers=source["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=source.get("num_key_value_heads") or heads,
        head_dim=source.get("head_dim") or source["hidden_size"] // heads,
        qkv_bias=family == "qwen2" or bias,
        o_bias=family != "qwen2" and bias,
        qk_norm=family == "qwen3",
        tie_word_embeddings=source.get("tie_word_embeddings", False),
        rms_norm_eps=source.get("rms_norm_eps", 1e-6),
        max_position_embeddings=source.get("max_position_embeddings", 2048),
        rope_theta=rope.get("rope_theta", source.get("rope_theta", 10000.0)),
        rope_llama3={key: rope[key] for key in LLAMA3_SCALING} if rope_type == "llama3" else None,
        source=source,
    )


# ---- finding and loading a folder ----------------------------------------------------------------
def find_folder(model: str | Path) -> Path:
    """The local folder of a model: itself, or the hub's, fetched with huggingface_hub.

    The only code that uses the network.
    """
    name = str(model)
    if name == "mini":  # the one that ships with the project, wherever the command is started
        return Path(__file__).parent / "mini"
    if Path(model).is_dir():
        return Path(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"--model {name}: no such folder (a hub id looks like Qwen/Qwen2.5-1.5B-Instruct)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    # ValueError: not a valid hub id.
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"--model {name}: no such folder here, "
                        f"and it could not be fetched from the hub ({reason})") from e


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file; --model must be a folder in Hugging Face format") from e
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON") from e


def read_weights(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a folder by name, from model.safetensors or from the shards that its index lists."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        raise UserError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there "
                        "(weights in other formats are not read)")
    weights = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{index}: the shard {shard!r} lies outside the folder; it is not read")
        try:
            with safe_open(folder / shard, "pt", device=str(device)) as f:
                for name in f.keys():  # noqa: SIM118 (a safetensors file is not a dict)
                    weights[name] = f.get_tensor(name)
        except FileNotFoundError as e:
            raise UserError(f"{folder / shard}: no such file, but the index lists it; "
                            "fetch the folder again") from e
        except SafetensorError as e:
            raise UserError(f"{folder / shard}: truncated or damaged ({e}); fetch the file again") from e
    return weights


def load(model: str | Path, device: str = "auto", dtype: str = "auto") -> tuple[Transformer, Tokenizer]:
    """(Transformer, Tokenizer) of a Hugging Face folder or hub id.

    Raises UserError for anything wrong in the folder.
    """
    device, dtype = device_and_dtype(device, dtype)
    folder = find_folder(model)
    config = config_of(read_json(folder / "config.json"), folder / "config.json")
    tokenizer = Tokenizer(folder)
    if tokenizer.size > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.size} ids but the model only "
                        f"{config.vocab_size}; the two do not belong together")
    with torch.device("meta"):
        transformer = Transformer(config)
    weights = read_weights(folder, device)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # some folders store the tied head twice
    check_weights(folder, weights, transformer.state_dict())
    weights = {name: w.to(dtype) for name, w in weights.items()}
    transformer.load_state_dict(weights, strict=True, assign=True)
    transformer.frequencies = transformer.frequencies.to(device)
    transformer.vocab = tokenizer.size
    return transformer, tokenizer


def check_weights(folder: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises UserError that names the tensors which are missing, unexpected or of another shape."""
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unexpected" for name in found if name not in expected]
    for name, w in expected.items():
        if name in found and found[name].shape != w.shape:
            wrong.append(f"{name} has shape {tuple(found[name].shape)}, the config says {tuple(w.shape)}")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(wrong[:3])}{more}")


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
    uses_triton(found, dtype)  # refuses a wrong KERNELS now, before anything is written
    return found, dtype


# ---- saving a folder -----------------------------------------------------------------------------
def save(path: str | Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write a Hugging Face folder that transformers and vLLM load unchanged.

    Each file appears whole or not at all.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().to("cpu").contiguous() for name, w in model.state_dict().items()}
    save_tensors(path / "model.safetensors", weights)
    for name, content in tokenizer.files.items():
        if name != "generation_config.json":
            write_whole(path / name, content.decode("utf-8"))
    # Engines stop where generation_config.json says. A base model's names the end of a document, not that of
    # a turn, so our stop ids go in.
    generation = json.loads(tokenizer.files.get("generation_config.json", b"{}"))
    generation["eos_token_id"] = tokenizer.stop_ids
    write_whole(path / "generation_config.json", json.dumps(generation, indent=2))
    config = {**model.config.source, "torch_dtype": str(model.dtype).removeprefix("torch.")}
    # transformers 5's name for torch_dtype goes, or the two could disagree.
    config.pop("dtype", None)
    write_whole(path / "config.json", json.dumps(config, indent=2))


def save_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file that is there whole or not at all."""
    tmp = f"{path}.tmp"
    try:
        # The metadata tells transformers that the tensors are PyTorch's.
        save_file(tensors, tmp, metadata={"format": "pt"})
    except SafetensorError as e:  # a full disk comes out as this
        Path(tmp).unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written ({e})") from e
    os.chmod(tmp, 0o644)  # the library makes it readable by its owner only
    with open(tmp, "rb") as f:
        os.fsync(f.fileno())
    os.replace(tmp, path)
