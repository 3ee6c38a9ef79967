"""A small SkyRL-shaped job: a visible task that trains, an actor with a real vLLM engine of random weights on the CPU."""

from __future__ import annotations

import json
import logging
import os
import sys

import ray


def tiny_model(folder: str) -> str:
    """A Llama of one layer and a tokenizer of 128 words, in `folder`."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(126)} | {"<unk>": 126, "</s>": 127}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "torch_dtype": "float32",
    }
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file)
    return folder


@ray.remote(num_cpus=1)
class VLLMEngine:
    def __init__(self, folder: str) -> None:
        from skyrl.train.utils.utils import configure_ray_worker_logging

        configure_ray_worker_logging()
        from vllm import LLM

        self.llm = LLM(tiny_model(folder), load_format="dummy", enforce_eager=True, max_model_len=128, dtype="float32")
        configure_ray_worker_logging()

    def generate(self, count: int) -> int:
        from vllm import SamplingParams

        for number in range(count):
            logging.getLogger("vllm.tagged").info("tag vllm %d", number)
        logging.getLogger("vllm.tagged").warning("vllm warns")
        outputs = self.llm.generate(["w1 w2 w3"], SamplingParams(max_tokens=8))
        return len(outputs)


@ray.remote(num_cpus=1)
class PolicyWorker:
    def train(self, count: int) -> None:
        from loguru import logger
        from skyrl.train.utils.utils import configure_ray_worker_logging

        for number in range(count):
            configure_ray_worker_logging()
            logging.basicConfig(force=True, level="INFO") if number % 2 else None
            logging.getLogger("skyrl.policy").info("tag skyrl %d", number)
            logger.bind(stdlib_logger="harbor.env").info("tag harbor {}", number)


@ray.remote(num_cpus=1)
def skyrl_entrypoint(folder: str) -> None:
    from skyrl.train.utils.utils import configure_ray_worker_logging

    configure_ray_worker_logging()
    engine, policy = VLLMEngine.remote(folder), PolicyWorker.remote()
    ray.get(policy.train.remote(20))
    print("generated", ray.get(engine.generate.remote(20)))
    for number in range(20):
        logging.getLogger("examples.train").info("tag examples %d", number)


if __name__ == "__main__":
    # SkyRL's package brings more than its logging; what the engine's own environment lacks is looked for behind it.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=True)
    ray.get(skyrl_entrypoint.remote(sys.argv[1]))
    ray.shutdown()
