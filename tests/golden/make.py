"""Make the golden files with transformers: python tests/golden/make.py [folder of a real model ...]

mini_logits.json: logits of the miniature. chat.json: what each family's own template renders. The families
whose template is not at hand (Qwen3, Llama 3) are checked by hand against their published templates and kept
as the file has them.
"""
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

here = Path(__file__).parent
mini = here.parent.parent / "mini"
messages = [{"role": "user", "content": "Numbers: 3 4 5\nTarget: 23\nTry."}]
tokenizer = AutoTokenizer.from_pretrained(mini)
tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
model = AutoModelForCausalLM.from_pretrained(mini, dtype=torch.float32)
with torch.no_grad():
    logits = model(torch.tensor([tokens])).logits[0, -1]
golden = {"messages": messages, "tokens": tokens, "logits": [round(x, 5) for x in logits.tolist()]}
(here / "mini_logits.json").write_text(json.dumps(golden))

cases = json.loads((here / "chat.json").read_text())
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for case in cases:
        if case.get("model") == Path(folder).name:
            case["text"] = tokenizer.apply_chat_template(
                case["messages"], add_generation_prompt=True, tokenize=False)
(here / "chat.json").write_text(json.dumps(cases, indent=1))
