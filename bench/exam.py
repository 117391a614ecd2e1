"""What all models of a demo are judged by: held-out prompts, noise, truth, floor. The report and studies share it."""

from collections.abc import Sequence

from reelforge.bench.evaluation import (
    TRUTH_SAMPLES,
    Evaluation,
    EvaluationConfig,
    Judge,
    Measured,
    evaluate,
    held_out_prompts,
    truth_clips,
)
from reelforge.bench.judge.results import Score
from reelforge.bench.toy import calibration
from reelforge.engine.core import rng
from reelforge.engine.model.folder import ModelFolder
from reelforge.engine.model.generator import through_codec


class Exam:
    """A calibrated judge and what it asks of models.

    Args:
        config: how much is sampled.
        base: the demo's first model, whose clip size and codec are all models'.
        seed: names the truth, the noise and every bootstrap.

    Attributes:
        prompts: held-out ones.
        asked: a prompt for each of a model's clips.
        truth: clean clips of ``asked`` through the codec.
        floor: clean clips of other prompts.
    """

    def __init__(self, config: EvaluationConfig, base: ModelFolder, seed: int) -> None:
        self.config, self.seed, self.codec, self.video = config, seed, base.codec, base.defaults.video
        self.judge = Judge(calibration.learn_basis(rng.key("basis", seed), spec=self.video), self.video)
        scenes, samples = held_out_prompts(config.prompts), config.samples
        self.prompts = [prompt for _, prompt in scenes]
        self.asked = [prompt for prompt in self.prompts for _ in range(samples)]
        members = (range(samples), range(samples, samples + TRUTH_SAMPLES))
        clean, others = (through_codec(self.codec, truth_clips(scenes, part, self.video, seed)) for part in members)
        self.truth = self.judge.calibrate(clean, self.asked, others)
        self.floor = self.judge.floor(self.truth)

    def evaluate(
        self,
        folder: ModelFolder,
        settings: Sequence[str],
        label: str,
        draw: int = 0,
        requests: Sequence[str] | None = None,
        written: Sequence[str] | None = None,
    ) -> Evaluation:
        """Sample a model and measure its clips.

        Args:
            requests: other words for the same scenes than :attr:`prompts`.
            written: what the model is given in their place.
            settings: how it is sampled, over the folder's defaults.
            label: of the progress line.
            draw: number of the noise; what is compared has the same.
        """
        config, noise, asked = self.config, rng.key("evaluation", self.seed, draw), requests or self.prompts
        return evaluate(folder, self.judge, asked, config.samples, noise, config.batch_size, label, settings, written)

    def table(self, measured: Measured, reference: Measured | None = None) -> dict[str, Score]:
        """Means with intervals, and paired changes to ``reference``."""
        return self.judge.table(measured, self.seed, reference)
