"""A vLLM engine that dies at its start: three key-value heads for two heads, which no attention can divide.

`python vllm_death.py FOLDER` writes a tiny random Llama there and tries to load it.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
words = {f"w{number}": number for number in range(126)} | {"<unk>": 126, "</s>": 127}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}
(folder / "config.json").write_text(json.dumps(config))

if __name__ == "__main__":
    from vllm import LLM

    LLM(str(folder), load_format="dummy", enforce_eager=True, max_model_len=128, dtype="float32")
