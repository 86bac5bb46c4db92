"""Vision-language model as a judge: score by a yes-or-no question about image and prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lit_prefopt.data.images import to_pil
from lit_prefopt.errors import InputError, check_number, quoted
from lit_prefopt.judges.judge import Judge
from lit_prefopt.judges.weights import loading_errors, version


class VisionLanguage(Judge):
    """Scores by the log-odds of yes against no, a vision-language model's answer to a question.

    The question is that of VQAScore (arXiv 2404.01291), which uses the probability of yes; the
    log-odds have the same order and do not saturate. Only the first token of an answer counts.

    Args:
        pretrained: Hub name or folder of a model that transformers loads as
            `AutoModelForImageTextToText`, and of its processor, which has a chat template.
        question: The question; `{text}` is replaced by the prompt.
        affirmed: The positive answer.
        denied: The negative answer.
        dtype: Precision of its weights.
        batch_size: Images scored at a time.
    """

    def __init__(
        self,
        pretrained: str,
        question: str = 'Does this figure show "{text}"? Please answer yes or no.',
        affirmed: str = "Yes",
        denied: str = "No",
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        batch_size: int = 4,
    ) -> None:
        if "{text}" not in question:
            raise InputError(
                f"The question {quoted(question)} does not contain the prompt: write {{text}} in "
                "its place."
            )
        check_number("batch_size", batch_size, 1)
        self.pretrained, self.question = pretrained, question
        self.affirmed, self.denied = affirmed, denied  # YAML parses bare yes and no as booleans
        self.dtype, self.batch_size = dtype, batch_size

    @cached_property
    def model(self) -> Any:
        """The model, loaded on first access."""
        from transformers import AutoModelForImageTextToText

        with self._loading("vision-language model"):
            model = AutoModelForImageTextToText.from_pretrained(
                self.pretrained, dtype=getattr(torch, self.dtype), trust_remote_code=False
            )
        return model.eval().requires_grad_(False)

    @cached_property
    def processor(self) -> Any:
        """The processor of images and questions."""
        from transformers import AutoProcessor

        with self._loading("processor"):
            processor = AutoProcessor.from_pretrained(self.pretrained, trust_remote_code=False)
            if not processor.chat_template:
                raise ValueError("it has no chat template")
        processor.tokenizer.padding_side = "left"  # the answer starts after the last token
        return processor

    @cached_property
    def answer_tokens(self) -> tuple[int, int]:
        """The first token of each answer."""
        words = (self.affirmed, self.denied)
        tokens = [self.processor.tokenizer.encode(w, add_special_tokens=False) for w in words]
        if not all(tokens) or tokens[0][0] == tokens[1][0]:
            raise InputError(
                f"{quoted(self.affirmed)} and {quoted(self.denied)} have the same first token in "
                f"{self.pretrained}: choose other words as `affirmed` and `denied`."
            )
        return tokens[0][0], tokens[1][0]

    def prepare(self) -> None:
        """Load the model and its processor."""
        _ = self.model, self.answer_tokens

    def versions(self) -> dict[str, str | None]:
        """Return the versions of the weights."""
        return {self.pretrained: version(self.pretrained)}

    @torch.no_grad()
    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return one score per image, (B,) float32.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            texts: B prompts.
            t: Ignored.
        """
        self.model.to(images.device)
        size = self.batch_size
        parts = zip(images.split(size), range(0, len(texts), size), strict=True)
        return torch.cat([self._score(some, texts[i : i + size]) for some, i in parts])

    def model_inputs(self, images: Tensor, texts: Sequence[str]) -> Any:
        """Return the model's input for images (B, 3, H, W) in [-1, 1] and B prompts."""
        chats: list[Any] = []
        for image, text in zip(images, texts, strict=True):
            seen = {"type": "image", "image": to_pil(image)}
            question = {"type": "text", "text": self.question.replace("{text}", text)}
            chats.append([{"role": "user", "content": [seen, question]}])
        return self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )

    def _score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        inputs = self.model_inputs(images, texts).to(images.device, self.model.dtype)
        logits = self.model(**inputs).logits[:, -1].float()
        yes, no = self.answer_tokens
        return logits[:, yes] - logits[:, no]

    def _loading(self, name: str) -> Any:
        return loading_errors(
            self.pretrained,
            name,
            "name a model of images and text in transformers, with its processor, and install "
            "the packages that the processor requires",
        )
