"""``reelforge judge``: models filmed on the same prompts, scored and compared, on one page."""

import argparse
import json

from reelforge.bench.judge import judging
from reelforge.bench.judge.config import JudgeConfig
from reelforge.engine.core import config as configuration
from reelforge.engine.core import distributed
from reelforge.stages.console import emit


def main(arguments: argparse.Namespace) -> int:
    """The verb: prints where the page is."""
    config = configuration.load(JudgeConfig, arguments.recipe, arguments.overrides)
    with distributed.process_group(distributed.pick_device(config.device)):
        emit(json.dumps({"report": str(judging.run(config))}))
    return 0
