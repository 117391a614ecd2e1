"""Properties of the bucket sampler, against brute-force counting."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.engine.data.buckets import BucketSampler, Shape

SHAPES: list[Shape] = [(5, 8, 8), (5, 8, 14), (9, 8, 8), (1, 16, 16)]

shape_lists = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=60)
sizes, seeds = st.integers(1, 9), st.integers(0, 2**40)


@settings(max_examples=60, deadline=None)
@given(shape_lists, sizes, seeds)
def test_every_batch_has_one_shape_and_the_full_size(shapes: list[Shape], size: int, seed: int) -> None:
    sampler = BucketSampler(shapes, size, seed)
    for step in range(30):
        batch = sampler.batch(step)
        assert len(batch) == size
        assert len({shapes[index] for index in batch}) == 1


@settings(max_examples=60, deadline=None)
@given(shape_lists, sizes, seeds)
def test_each_bucket_is_a_chain_of_permutations(shapes: list[Shape], size: int, seed: int) -> None:
    """Per bucket, the concatenated batches contain every member once per epoch: nothing dropped, nothing repeated."""
    sampler = BucketSampler(shapes, size, seed)
    streams: dict[Shape, list[int]] = {}
    for step in range(4 * len(shapes)):
        batch = sampler.batch(step)
        streams.setdefault(shapes[batch[0]], []).extend(batch)
    for shape, stream in streams.items():
        members = {index for index, other in enumerate(shapes) if other == shape}
        for start in range(0, len(stream) - len(members) + 1, len(members)):
            assert set(stream[start : start + len(members)]) == members


@settings(max_examples=40, deadline=None)
@given(shape_lists, sizes, seeds, st.permutations(range(20)))
def test_a_pure_function_of_seed_and_step(shapes: list[Shape], size: int, seed: int, order: list[int]) -> None:
    """Any order of calls, any process, any rank: the same batches; so resume needs the step alone."""
    sampler = BucketSampler(shapes, size, seed)
    straight = [sampler.batch(step) for step in range(20)]
    again = BucketSampler(shapes, size, seed)
    assert {step: again.batch(step) for step in order} == dict(enumerate(straight))


@settings(max_examples=40, deadline=None)
@given(shape_lists, seeds, st.integers(1, 200))
def test_buckets_are_drawn_by_size(shapes: list[Shape], seed: int, rounds: int) -> None:
    """After whole rounds of one-clip batches, every clip has been drawn equally often."""
    sampler = BucketSampler(shapes, 1, seed)
    steps = min(rounds, 10) * len(shapes)
    counts = Counter(sampler.batch(step)[0] for step in range(steps))
    assert set(counts.values()) == {min(rounds, 10)} and len(counts) == len(shapes)


def test_proportions_when_sizes_do_not_divide() -> None:
    shapes = [SHAPES[0]] * 37 + [SHAPES[1]] * 11 + [SHAPES[2]] * 2
    sampler = BucketSampler(shapes, 4, 7)
    drawn = Counter(shapes[sampler.batch(step)[0]] for step in range(1250))  # 100 epochs
    assert drawn == {SHAPES[0]: 925, SHAPES[1]: 275, SHAPES[2]: 50}


def test_fewer_clips_than_a_batch() -> None:
    sampler = BucketSampler([SHAPES[0]], 4, 0)
    assert [sampler.batch(step) for step in (0, 1, 10**6)] == [[0] * 4] * 3


def test_far_steps_are_cheap_and_right() -> None:
    """Step a million, reached directly, continues the counting of a small brute-force model."""
    sampler = BucketSampler([SHAPES[0]] * 10 + [SHAPES[1]] * 5, 4, 3)
    bucket, ordinal = sampler.draw(10**6)
    # 10/4 + 5/4 batches an epoch: step 10**6 lies in epoch 266,666 with 2/3 of the draws from the larger bucket.
    share = (2 / 3, 1 / 3)[bucket]
    assert abs(ordinal - share * 10**6) < 4


@settings(max_examples=40, deadline=None)
@given(shape_lists, sizes, seeds, st.integers(1, 2000))
def test_token_limit(shapes: list[Shape], size: int, seed: int, max_tokens: int) -> None:
    sampler = BucketSampler(shapes, size, seed, max_tokens)
    for step in range(20):
        batch = sampler.batch(step)
        t, h, w = shapes[batch[0]]
        assert len(batch) == 1 or len(batch) * t * h * w <= max_tokens
        assert len(batch) == size or (len(batch) + 1) * t * h * w > max_tokens


def test_ranks_partition_the_batch() -> None:
    sampler = BucketSampler([SHAPES[0]] * 20, 8, 1)
    batch = sampler.batch(5)
    for world in (1, 2, 4):
        assert sorted(index for rank in range(world) for index in batch[rank::world]) == sorted(batch)


def test_seeds_and_epochs_differ() -> None:
    shapes = [SHAPES[0]] * 16
    first, other = BucketSampler(shapes, 16, 0), BucketSampler(shapes, 16, 1)
    assert first.batch(0) != first.batch(1) != other.batch(1) != other.batch(0)
