"""A row of chat data, checked: what its fields mean is used, or the row is refused with its line."""
from cli import UserError
from files import to_json

# Fields of a row or a turn that change what it says and cannot be used here. Empty ones say nothing.
UNSUPPORTED = ("tool_calls", "function_call", "refusal", "audio", "images", "videos", "tools", "functions",
               "documents", "chat_template_kwargs", "system")
TRAINED = ("weight", "loss_weight", "train", "training", "loss", "label")  # whether to train on it
REASONING = ("reasoning_content", "reasoning", "thinking")
NOT_MESSAGES = "messages must be a list of {role: system|user|assistant, content: text}"


def plain_messages(row: dict, where: str) -> list[dict]:
    """The messages of a row as {role, content}, two texts each, of which the last is trained.

    Reasoning becomes <think>, parts of a text are joined. Raises UserError, which names `where`.
    """
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: {NOT_MESSAGES}")
    for holder in (row, *messages):
        refuse_unused(holder, holder is row or holder is messages[-1], where)
    plain = [{"role": message.get("role"), "content": text_of(message, where)} for message in messages]
    if len(plain) < 2 or plain[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last of the messages must be the assistant's, "
                        "after at least one other")
    after_thought = plain[-1]["content"].rpartition("</think>")[2]
    if not after_thought.strip():
        raise UserError(f"{where}: the last turn is empty, which would teach silence; leave the row out")
    if "<think>" in after_thought:
        raise UserError(f"{where}: the <think> of the last turn is never closed; leave the row out")
    return plain


def refuse_unused(holder: dict, is_trained: bool, where: str) -> None:
    """Refuses fields of a row or a turn that cannot be used: of the turns the last is trained."""
    for name in UNSUPPORTED:
        if holder.get(name):
            raise UserError(f"{where}: {name} is not supported; remove it, or leave the row out")
    for name in TRAINED if holder.get("role", "assistant") == "assistant" else ():  # a row has no role
        wanted = holder.get(name)
        if wanted is not None and wanted != is_trained:  # a weight of 1 is True, as Python has it
            raise UserError(f"{where}: {name} is {to_json(wanted)}, but the last turn of a row is trained "
                            "and no other; cut the conversation there, or leave the row out")


def text_of(message: dict, where: str) -> str:
    """What a turn says, its reasoning in <think>."""
    content = message.get("content")
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if message.get("role") not in ("system", "user", "assistant") or not isinstance(content, str):
        raise UserError(f"{where}: {NOT_MESSAGES}")
    thought = next((message[name] for name in REASONING if message.get(name)), None)
    if thought is None:
        return content
    if not isinstance(thought, str) or message["role"] != "assistant" or "think>" in thought + content:
        raise UserError(f"{where}: reasoning must be text, of an assistant's turn, and neither it nor the "
                        "content may have <think>")
    return f"<think>\n{thought.strip()}\n</think>\n\n{content}"


def _is_text_part(part):
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
