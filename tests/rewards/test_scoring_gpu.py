"""On a GPU a batch is decoded after its rollout and beside the next one: the streams wait, the host does not."""

import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from reelforge.engine.rewards.contract import Scores
from reelforge.engine.rewards.scoring import Scoring, ScoringConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHAPE = (2, 1, 2, 64, 64)


class Level:
    axes = ("level",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        return {"level": Scores.of(videos.cuda().float().mean((1, 2, 3, 4)))}


@pytest.mark.parametrize("overlap", [True, False])
def test_decoding_waits_for_its_rollout_and_not_for_the_next(overlap: bool) -> None:
    streams: list[torch.cuda.Stream] = []

    def decode(latents: Tensor) -> Tensor:
        streams.append(torch.cuda.current_stream())
        return latents.movedim(1, -1).expand(-1, -1, -1, -1, 3).byte().cpu()

    scoring = Scoring([Level()], decode, ScoringConfig(overlap=overlap))
    latents = torch.zeros(SHAPE, device="cuda")
    torch.cuda._sleep(400_000_000)  # the rollout is still to come when its latents are handed over
    latents += 7
    start = time.monotonic()
    pending = scoring.submit(latents, ["", ""])
    if overlap:
        assert time.monotonic() - start < 0.1 and not pending.future.done()
    del latents
    torch.full(SHAPE, 99.0, device="cuda")  # takes what memory is free to be taken
    torch.cuda._sleep(2_000_000_000)  # the next rollout
    after_next = torch.cuda.Event()
    after_next.record()
    assert pending.result()["level"].values.tolist() == [7, 7]
    assert not after_next.query()
    assert streams[0] != torch.cuda.current_stream()
