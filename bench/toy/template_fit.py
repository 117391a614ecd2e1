"""Explains a clip as "one shape of the toy world on a plain background", in least squares over every pixel.

With m the coverage of a template, the squared error of a frame x is a closed form of three sums,
    |x - b - (c - b) m|^2 = |x - b|^2 - 2 (c - b) . <x - b, m> + |c - b|^2 |m|^2,
so that all positions cost one correlation. The fit goes from coarse to fine: (1) background and colour of the
clip by a circular probe at all positions; (2) position per frame, on the clip's projection to (c - b); (3) shape
and size of the clip, and the position again, by a bank of templates round (2); (4) parabolas through the errors
for sub-pixel size and position; (5) the errors of all palette pairs with the ideal coverage drawn there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reelforge.bench.toy.render import RADIUS, SOFT_EDGE, coverage, scale_of
from reelforge.bench.toy.world import BACKGROUNDS, COLOURS, SHAPES

_PROBE_RADIUS = 6.0
_SIZE_STEP, _SIZE_COUNT = 0.6, 5  # radii 5.0 ... 7.4 round the middle of RADIUS
_SHIFT = 3  # pixels the probe may miss by; a triangle's mass lies 2 below its middle
_FRAME_STRIDE = 4  # colours do not change: every fourth frame decides them


@dataclass(frozen=True)
class Fit:
    """B clips of F frames, explained. Lengths are in pixels of the clip.

    Attributes:
        background_error: ``[B, 3]`` mean squared error per background, with the best colour.
        colour_error: ``[B, 6]`` mean squared error per colour, on the best background.
        shape_error: ``[B, 3]`` squared error of the coverage per shape, per pixel of the object.
        background, colour, shape: long ``[B]``, the best of each.
        radius: ``[B]``.
        size_wobble: ``[B]`` rms of the radius per frame round its mean.
        centres: ``[B, F, 2]`` (x, y).
        ideal: ``[B, F, H, W]`` coverage of the ideal picture.
        seen: ``[B, F, H, W]`` the clip projected: 0 background, 1 colour.
        error: ``[B]`` mean squared difference from the ideal picture; all errors are of pixels in [0, 1].
    """

    background_error: Tensor
    colour_error: Tensor
    shape_error: Tensor
    background: Tensor
    colour: Tensor
    shape: Tensor
    radius: Tensor
    size_wobble: Tensor
    centres: Tensor
    ideal: Tensor
    seen: Tensor
    error: Tensor

    def velocity(self) -> tuple[Tensor, Tensor]:
        """Straight line through the centres: ``[B, 2]`` pixels per frame, and ``[B]`` rms distance from it."""
        times = torch.arange(self.centres.shape[1], dtype=torch.float32)
        times = (times - times.mean())[:, None]
        middle = self.centres.mean(1, keepdim=True)
        velocity = ((self.centres - middle) * times).sum(1) / times.square().sum()
        off = self.centres - middle - times * velocity[:, None]
        return velocity, off.square().sum(-1).mean(-1).sqrt()


def _vertex(values: Tensor, index: Tensor) -> Tensor:
    """Offset of a parabola's maximum from ``index``, through ``values[..., index - 1 : index + 2]``.

    ``index`` is clamped to the interior; the offset is within one step.
    """
    inner = index.clamp(1, values.shape[-1] - 2)
    below, here, above = (values.gather(-1, (inner + step)[..., None])[..., 0] for step in (-1, 0, 1))
    bend = (below + above - 2 * here).clamp(max=-1e-6)
    return inner + (0.5 * (below - above) / bend).clamp(-1, 1)


def _best_pair(error: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the smallest of ``[B, backgrounds, colours]``, each ``[B]``."""
    best = error.flatten(1).argmin(1)
    return best // error.shape[2], best % error.shape[2]


class TemplateFit:
    """The fitter for one frame size; holds its template bank."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.scale = scale_of(height, width)
        self.soft_edge = SOFT_EDGE * self.scale
        middle = sum(RADIUS) / 2
        steps = torch.arange(_SIZE_COUNT) - _SIZE_COUNT // 2
        self.radii = (middle + _SIZE_STEP * steps) * self.scale
        self.backgrounds = torch.tensor(list(BACKGROUNDS.values()))
        self.contrasts = torch.tensor(list(COLOURS.values())) - self.backgrounds[:, None]
        self._build_probe()
        self._build_bank()

    def _build_probe(self) -> None:
        y = torch.fft.fftfreq(self.height, 1 / self.height)[:, None]
        x = torch.fft.fftfreq(self.width, 1 / self.width)[None]
        probe = coverage("circle", x, y, _PROBE_RADIUS * self.scale, self.soft_edge)
        self.probe = torch.fft.rfft2(probe).conj()
        self.probe_sum, self.probe_energy = probe.sum(), probe.square().sum()
        self.margin = round(_PROBE_RADIUS * self.scale)

    def _build_bank(self) -> None:
        """``[P*P, shapes * sizes * shifts]`` templates in a window of P pixels round the probe's position."""
        self.shift = round(_SHIFT * self.scale)
        self.reach = int(1.2 * self.radii[-1].item() + self.soft_edge / 2) + 1 + self.shift
        grid = torch.arange(-self.reach, self.reach + 1).float()
        shifts = torch.arange(-self.shift, self.shift + 1).float()
        y = grid[:, None] - shifts[:, None, None, None]
        x = grid[None, :] - shifts[None, :, None, None]
        templates = [coverage(s, x, y, r, self.soft_edge) for s in SHAPES for r in self.radii]
        self.bank = torch.stack(templates).flatten(-2).flatten(0, 2).T.contiguous()
        self.bank_energy = self.bank.square().sum(0)

    def __call__(self, videos: Tensor) -> Fit:
        """Fit uint8 ``[B, F, H, W, 3]``."""
        assert videos.dtype == torch.uint8 and videos.shape[2:] == (self.height, self.width, 3)
        frames = videos.movedim(-1, 2).float() / 255
        sparse = frames[:, ::_FRAME_STRIDE]
        background, colour = _best_pair(self._palette_error(sparse, *self._probe_gain(sparse)))
        seen = self._project(frames, background, colour)
        shape_error, shape, radius, wobble, centres = self._locate(seen)
        ideal = self._draw(shape, radius, centres)
        error = self._palette_error(frames, *self._ideal_gain(frames, ideal))
        background, colour = _best_pair(error)
        rows = torch.arange(len(videos))
        return Fit(
            background_error=error[rows, :, colour],
            colour_error=error[rows, background],
            shape_error=shape_error,
            background=background,
            colour=colour,
            shape=shape,
            radius=radius,
            size_wobble=wobble,
            centres=centres,
            ideal=ideal,
            seen=seen,
            error=error[rows, background, colour],
        )

    def _project(self, frames: Tensor, background: Tensor, colour: Tensor) -> Tensor:
        """``[B, F, H, W]``: 0 where a pixel is the background, 1 where it is the colour."""
        contrast = self.contrasts[background, colour]
        unit = contrast / contrast.square().sum(-1, keepdim=True)
        offset = (unit * self.backgrounds[background]).sum(-1)
        return torch.einsum("bfchw,bc->bfhw", frames, unit) - offset[:, None, None, None]

    def _correlate(self, frames: Tensor) -> Tensor:
        """<frame, probe> for every position at which the probe is inside the frame."""
        spectrum = torch.fft.rfft2(frames) * self.probe
        response = torch.fft.irfft2(spectrum, s=(self.height, self.width))
        inside = slice(self.margin, -self.margin)
        return response[..., inside, inside]

    def _probe_gain(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c - b) . <x, probe> at the best position ``[B, F, 4, 6]``, and the probe's sum and energy."""
        response = self._correlate(frames).flatten(-2)
        gain = torch.einsum("kc,bfcp->bfkp", self.contrasts.flatten(0, 1), response).amax(-1)
        return gain.unflatten(-1, self.contrasts.shape[:2]), self.probe_sum, self.probe_energy

    def _ideal_gain(self, frames: Tensor, ideal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the ideal coverage of each frame."""
        response = (frames.flatten(3) @ ideal.flatten(2)[..., None])[..., 0]
        gain = torch.einsum("kjc,bfc->bfkj", self.contrasts, response)
        flat = ideal.flatten(2)[..., None, :]
        return gain, flat.sum(-1, keepdim=True), flat.square().sum(-1, keepdim=True)

    def _palette_error(self, frames: Tensor, gain: Tensor, cover: Tensor, energy: Tensor) -> Tensor:
        """``[B, backgrounds, colours]`` mean squared error of the clip, by the closed form above."""
        pixels = 3 * self.height * self.width
        mean, square = frames.mean((-2, -1)), frames.square().mean((-3, -2, -1))
        empty = square[..., None] + (self.backgrounds * (self.backgrounds - 2 * mean[..., None, :])).mean(-1)
        gain = gain - (self.contrasts * self.backgrounds[:, None]).sum(-1) * cover
        explained = (2 * gain - self.contrasts.square().sum(-1) * energy) / pixels
        return (empty[..., None] - explained).mean(1).clamp_min(0)

    def _locate(self, seen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Shape errors ``[B, 3]``, shape, radius, its wobble, and centres ``[B, F, 2]``."""
        count, num_frames = seen.shape[:2]
        response = self._correlate(seen)
        best = response.flatten(2).argmax(-1)
        y, x = best // response.shape[-1] + self.margin, best % response.shape[-1] + self.margin
        windows = self._windows(seen, y, x)
        span = 2 * self.shift + 1
        gain = (2 * windows @ self.bank - self.bank_energy).view(count, num_frames, len(SHAPES), -1, span * span)
        per_size, shift = gain.max(-1)
        per_shape = per_size.mean(1)
        rows = torch.arange(count)
        nominal = self.bank_energy.view(len(SHAPES), _SIZE_COUNT, -1)[0, _SIZE_COUNT // 2, 0]
        shape_error = (seen.square().sum((2, 3)).mean(1)[:, None] - per_shape.amax(-1)) / nominal
        shape = shape_error.argmin(-1)
        sizes = per_size[rows, :, shape]
        size = per_shape[rows, shape].argmax(-1)
        radius = self._radius(per_shape[rows, shape], size)
        wobble = self._radius(sizes, sizes.argmax(-1)).std(-1, correction=0)
        near = gain[rows, :, shape, size].unflatten(-1, (span, span))
        shift = shift[rows, :, shape, size]
        dy = _vertex(near.amax(-1), shift // span) - self.shift
        dx = _vertex(near.amax(-2), shift % span) - self.shift
        centres = torch.stack((x + dx, y + dy), dim=-1) + 0.5
        return shape_error, shape, radius, wobble, centres

    def _radius(self, gains: Tensor, index: Tensor) -> Tensor:
        return self.radii[0] + _vertex(gains, index) * (self.radii[1] - self.radii[0])

    def _windows(self, seen: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """``[B, F, P*P]`` pixels round (y, x); background beyond the frame."""
        padded = torch.nn.functional.pad(seen, (self.reach,) * 4)
        span = torch.arange(2 * self.reach + 1)
        row, column = y[..., None] + span, x[..., None] + span
        index = row[..., :, None] * padded.shape[-1] + column[..., None, :]
        return padded.flatten(2).gather(-1, index.flatten(2))

    def _draw(self, shape: Tensor, radius: Tensor, centres: Tensor) -> Tensor:
        """Coverage ``[B, F, H, W]`` of the fitted objects."""
        x = torch.arange(self.width) + 0.5 - centres[..., 0, None]
        y = torch.arange(self.height) + 0.5 - centres[..., 1, None]
        ideal = torch.empty(*centres.shape[:2], self.height, self.width)
        for index, name in enumerate(SHAPES):
            chosen = shape == index
            size = radius[chosen, None, None, None]
            offsets = x[chosen, :, None, :], y[chosen, :, :, None]
            ideal[chosen] = coverage(name, *offsets, size, self.soft_edge)
        return ideal
