"""Text alignment by CLIP (Radford et al. 2021), or by PickScore (Kirstain et al. 2023), over a clip's frames.

    score = mean over every 4th frame of  exp(logit_scale) cos(image embedding, text embedding)

The released models' exp(logit_scale) is 100, so this is 100 cos as CLIPScore is usually reported, but not cut off at 0:
a reward needs a slope there too. Typical values are 15 to 35. CLIP reads 77 tokens: what a longer prompt says beyond
them moves no score. Every clip is a forward of its own in fp32, so that it scores the same in any batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from reelforge.engine.core.distributed import pick_device
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.progress import say
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.rewards.contract import Scores

_FRAME_STRIDE = 4
# Of every released CLIP and PickScore, on RGB in [0, 1].
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipScore:
    """A :class:`~reelforge.engine.rewards.contract.Scorer` on the axis ``clip``.

    Args:
        video: the clip size; any will do.
        folder: a CLIP model as transformers saves it: ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Raises:
        ConfigError: transformers is not installed, or the folder holds no such model.
    """

    axes: tuple[str, ...] = ("clip",)

    def __init__(self, video: VideoSpec, folder: str) -> None:
        del video
        self._model, self._tokenizer = _load(Path(folder).expanduser())
        self._device = pick_device("auto")
        self._model.to(self._device)
        self._side: int = self._model.config.vision_config.image_size
        self._max_tokens: int = self._model.config.text_config.max_position_embeddings
        self._told = False

    @torch.no_grad()
    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        """Score uint8 ``[B, F, H, W, 3]`` against B prompts."""
        scores = [
            self._model(input_ids=self._tokens(prompt), pixel_values=self._pixels(clip)).logits_per_image.mean()
            for clip, prompt in zip(videos, prompts, strict=True)
        ]
        return {self.axes[0]: Scores.of(torch.stack(scores).cpu())}

    def _tokens(self, prompt: str) -> Tensor:
        """Ids ``[1, S]``, unpadded; a cut prompt keeps its end mark, from which CLIP reads the whole."""
        ids = self._tokenizer(prompt, verbose=False).input_ids
        if len(ids) > self._max_tokens:
            self._notice()
            ids = [*ids[: self._max_tokens - 1], ids[-1]]
        return torch.tensor([ids], device=self._device)

    def _notice(self) -> None:
        if not self._told:
            say(f"CLIP reads {self._max_tokens} tokens: the rest of longer prompts counts for nothing.")
        self._told = True

    def _pixels(self, clip: Tensor) -> Tensor:
        """Frames as CLIP was trained on: shorter side scaled (bicubic, antialiased), middle square, normalised."""
        frames = clip[::_FRAME_STRIDE].to(self._device).movedim(-1, 1).float()
        size = [side * self._side // min(frames.shape[-2:]) for side in frames.shape[-2:]]
        frames = functional.interpolate(frames, size, mode="bicubic", antialias=True).round().clamp(0, 255) / 255
        top, left = ((side - self._side) // 2 for side in size)
        frames = frames[..., top : top + self._side, left : left + self._side]
        mean, std = (torch.tensor(values, device=self._device).view(3, 1, 1) for values in (_MEAN, _STD))
        return (frames - mean) / std


def _load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer. What a folder lacks transformers would make up: random weights, an empty vocabulary."""
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError as error:
        raise ConfigError(f"CLIP needs {error.name}.", "Run: pip install 'reelforge[wan]'.") from error
    hint = "Put config.json, model.safetensors and the tokenizer's files of a whole CLIP model there."
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}.", hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder} does not load ({error}).", hint) from error
    if report["missing_keys"]:
        raise ConfigError(f"{folder} has no weight {min(report['missing_keys'])}.", hint)
    known, wanted = len(tokenizer), model.config.text_config.vocab_size
    if known != wanted:
        raise ConfigError(f"The tokenizer of {folder} knows {known} tokens, the model {wanted}.", hint)
    return model.eval().requires_grad_(False), tokenizer


class PickScore(ClipScore):
    """The same on the axis ``pick``, for a PickScore folder; its tokenizer's files are those of CLIP ViT-H/14."""

    axes = ("pick",)
