"""A small SkyRL-shaped job: a visible task that trains, an actor with a real vLLM engine of random weights on the CPU."""

from __future__ import annotations

import json
import logging
import os
import sys

import ray

from tests.stack.programs.vllm_speaker import PRINTED, REST, SKYRL, VLLM, say


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

        say("engine, before its first record", VLLM, *PRINTED)
        configure_ray_worker_logging()
        from vllm import LLM

        self.llm = LLM(
            tiny_model(folder),
            load_format="dummy",
            enforce_eager=True,
            max_model_len=128,
            dtype="float32",
            worker_extension_cls="tests.stack.programs.vllm_speaker.Extension",
        )
        configure_ray_worker_logging()

    def generate(self, count: int) -> int:
        from vllm import SamplingParams

        for _ in range(count):
            say("engine", VLLM, *PRINTED, "log:vllm.tagged")
            say("engine", SKYRL, "log:skyrl.inference", "loguru:skyrl.inference")
            say("engine", REST, "log:other.library")
        outputs = self.llm.generate(["w1 w2 w3"], SamplingParams(max_tokens=8))
        self.llm.collective_rpc("speak")
        return len(outputs)


@ray.remote(num_cpus=1)
class PolicyWorker:
    def train(self, count: int) -> None:
        from skyrl.train.utils.utils import configure_ray_worker_logging

        say("policy, before its first record", SKYRL, *PRINTED)
        for number in range(count):
            configure_ray_worker_logging()
            logging.basicConfig(force=True, level="INFO") if number % 2 else None
            say("policy", SKYRL, "log:skyrl.policy", "loguru:harbor.env", *PRINTED)
            say("policy", VLLM, "log:vllm.distributed")
            say("policy", REST, "log:other.library")


@ray.remote(num_cpus=1)
def skyrl_entrypoint(folder: str) -> None:
    from skyrl.train.utils.utils import configure_ray_worker_logging

    configure_ray_worker_logging()
    say("entrypoint, before its first record", SKYRL, *PRINTED)
    engine, policy, served = VLLMEngine.remote(folder), PolicyWorker.remote(), serve.remote()
    ray.get(policy.train.remote(20))
    say("entrypoint", SKYRL, *["log:examples.train"] * 20, *PRINTED)
    print("generated", ray.get(engine.generate.remote(20)))
    print("served by", ray.get(served))


@ray.remote(num_cpus=0)
def serve() -> str:
    """In a process of its own: to name the actor's class is to import vLLM."""
    from tests.stack.programs.vllm_server import Server

    version: str = ray.get(ray.remote(num_cpus=0)(Server).remote().version.remote())
    return version


if __name__ == "__main__":
    # SkyRL's package brings more than its logging; what the engine's own environment lacks is looked for behind it.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=True)
    say("driver", REST, "print")
    ray.get(skyrl_entrypoint.remote(sys.argv[1]))
    ray.shutdown()
