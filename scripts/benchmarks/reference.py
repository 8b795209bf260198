"""What `transformers` itself says to the questions: greedy tokens and log-probabilities, kept on disk because they take minutes.

One prompt at a time on one thread in float32, through `generate`. Beside each answer stand the log-probabilities of its tokens, and
of the prompt's, by one float32 forward of `transformers`, and by one in float64 with float64 norms ("exact"), which tells
which of two roundings is nearer the truth. An answer is filed under the model's files, the length and the version of
`transformers`; questions may be added later.
"""

import hashlib
import json
import os
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from arms import note


@dataclass(frozen=True)
class Answer:
    """One question's reference. ``logprobs[i]`` and ``exact[i]`` belong to token ``i + 1`` of prompt and output together."""

    prompt: list[int]
    output: list[int]
    """Up to and including the end-of-sequence token, if there was one."""
    logprobs: list[float]
    exact: list[float]


def read_questions(path: Path, count: int) -> list[str]:
    """The first `count` questions of a file with one JSON object per line.

    Raises:
        ValueError: when the file is not there, or holds fewer.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} is not there; name a file of questions with --data (JSON lines with a 'question' each)"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < count:
        raise ValueError(f"--questions {count}: {path} holds {len(lines)}")
    return [json.loads(line)["question"] for line in lines[:count]]


class Reference:
    """Answers of the model in `folder`, `num_tokens` new tokens at most, kept under `home`. The model is read when needed."""

    def __init__(self, folder: Path, home: Path, num_tokens: int) -> None:
        self.folder = folder
        self._num_tokens = num_tokens
        self._models: dict[torch.dtype, Any] = {}
        version = metadata.version("transformers")
        self.path = home / "equality" / f"{_hash_of(folder)}-{num_tokens}-transformers-{version}.json"
        self._known: dict[str, Answer] = {}
        if self.path.is_file():
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            self._known = {key: Answer(**entry) for key, entry in saved.items()}

    def answers(self, questions: Sequence[str]) -> list[Answer]:
        """One answer per question; computes those that are not known, and saves each at once."""
        missing = [question for question in questions if question not in self._known]
        if missing:
            note(f"reference: {len(missing)} questions to compute, kept in {self.path}")
        for number, question in enumerate(missing):
            self._known[question] = self._answer(question)
            self._save()
            if (number + 1) % 5 == 0:
                note(f"  {number + 1} of {len(missing)}")
        return [self._known[question] for question in questions]

    def logits_after(self, tokens: Sequence[int]) -> torch.Tensor:
        """The float32 logits of the token that follows `tokens`: ``[vocab]``."""
        with torch.inference_mode():
            return self._model(torch.float32)(torch.tensor([list(tokens)])).logits[0, -1]

    def _answer(self, question: str) -> Answer:
        model, tokenizer = self._model(torch.float32), self._tokenizer()
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self._num_tokens, do_sample=False
            )
        output = out[0, len(prompt) :].tolist()
        whole = prompt + output
        return Answer(prompt, output, self._logprobs(whole, torch.float32), self._logprobs(whole, torch.float64))

    def _logprobs(self, tokens: list[int], dtype: torch.dtype) -> list[float]:
        with torch.inference_mode():
            logits = self._model(dtype)(torch.tensor([tokens])).logits[0, :-1]
            # the logits' own dtype may be narrower than asked for; the normalisation never is
            found = torch.log_softmax(logits.double(), -1)[range(len(tokens) - 1), tokens[1:]]
        return found.tolist()

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def _model(self, dtype: torch.dtype) -> Any:
        if dtype not in self._models:
            from transformers import AutoModelForCausalLM

            torch.set_num_threads(1)
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, attn_implementation="sdpa").eval()
            if dtype == torch.float64:
                _widen_norms(model)
            self._models[dtype] = model
        return self._models[dtype]

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({key: asdict(answer) for key, answer in self._known.items()}), encoding="utf-8")
        part.replace(self.path)


def _widen_norms(model: torch.nn.Module) -> None:
    """Let RMS norms compute in float64: `transformers`' own round to float32 whatever the model's dtype."""

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = types.MethodType(forward, module)


def _hash_of(folder: Path) -> str:
    """Of everything that decides what the model says."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
