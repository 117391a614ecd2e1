"""Video files in and out (PyAV): what a viewer would see at a time, as uint8 RGB.

Reading obeys the file: presentation timestamps (variable rates included), the display matrix (rotation and
mirroring), the sample aspect ratio, and the colour matrix and range. A file that cannot be shown whole raises
:class:`DataError`; nothing is guessed or padded.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from reelforge.engine.core.errors import DataError, StorageError
from reelforge.engine.core.files import sync

# Bicubic chroma, and no shortcuts that differ between processors.
_FILTER = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
# Containers only: no playlists, which name further files or addresses, and no text or image "videos".
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,ivf"
_BT709, _UNSPECIFIED = 1, 2
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
_X265_MIN_SIDE = 64  # x265 4.2 overruns its heap on pictures smaller than one coding unit (x265 issue 774)
# Containers with a coarse clock round each timestamp: Matroska to 1 ms.
_CLOCK_ERROR_S = 0.0006
# With its macroblock tree, x264 wrote other bytes for 30 and 34 of 100 small clips in two repeats; without, for none.
_REPEATABLE = {"libx264": {"x264-params": "mbtree=0"}}


@dataclass(frozen=True)
class Video:
    """Frames as shown.

    Attributes:
        frames: uint8 ``[F,H,W,3]`` RGB.
        fps: frames per second.
    """

    frames: np.ndarray
    fps: float


@dataclass(frozen=True)
class VideoInfo:
    """What a file claims, read without decoding more than one frame.

    Attributes:
        width: pixels as shown, after rotation and with square pixels.
        height: pixels as shown.
        fps: average frames per second.
        duration_s: length of the video stream; 0 when the file does not say.
        codec: FFmpeg's decoder name.
    """

    width: int
    height: int
    fps: float
    duration_s: float
    codec: str


@dataclass(frozen=True)
class Limits:
    """What a read may cost; larger files are refused before the cost is paid.

    Attributes:
        max_pixels: of one frame.
        max_decoded_frames: frames decoded in one read, those before the wanted span included.
        max_bytes: of the returned frames.
    """

    max_pixels: int = 7680 * 4320
    max_decoded_frames: int = 20_000
    max_bytes: int = 8 << 30


@dataclass(frozen=True)
class _Shown:
    """A decoded frame and when it is on screen, in seconds since the stream's start."""

    frame: av.VideoFrame
    start_s: float
    end_s: float


class _Source:
    """An opened file: its timeline, and its frames as RGB."""

    def __init__(self, path: Path, container: av.container.InputContainer, limits: Limits) -> None:
        pictures = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        streams = [s for s in pictures if s.codec_context is not None and s.time_base]  # None: no decoder for it
        if not streams:
            raise DataError(f"{path} has no video stream that can be decoded.", "Replace or re-encode the file.")
        self.path, self.container, self.stream, self.limits = path, container, streams[0], limits
        self.aspect = self.stream.sample_aspect_ratio or Fraction(1)
        height, width = self.stream.codec_context.height, round(self.stream.codec_context.width * self.aspect)
        if width * height > limits.max_pixels:
            raise DataError(f"{path} claims {width}x{height} pixels a frame.", f"The limit is {limits.max_pixels}.")
        self.fps = float(self.stream.average_rate or self.stream.guessed_rate or 0)
        self.interval_s = 1 / (self.fps or 25)
        self.origin_s = self._seconds(self.stream.start_time or 0)
        self._reformatter = VideoReformatter()

    def _seconds(self, ticks: int) -> float:
        return float(ticks * self.stream.time_base)

    @property
    def duration_s(self) -> float:
        """As the header says, 0 if it does not; the container's length counts only when no audio could stretch it."""
        if self.stream.duration is not None:
            return self._seconds(self.stream.duration)
        alone = len(self.container.streams) == 1 and self.container.duration is not None
        return self.container.duration / av.time_base if alone else 0.0

    def timeline(self, start_s: float = 0.0) -> Iterator[_Shown]:
        """Frames in order of presentation, from one on screen at ``start_s`` or before; at the end, the length."""
        last = None
        for upcoming in self._decode_from(start_s):
            if last is not None:
                if upcoming.start_s < last.start_s:
                    raise DataError(f"{self.path} runs backwards at {last.start_s:.3f} s.", "Re-encode the file.")
                yield replace(last, end_s=upcoming.start_s)
            last = upcoming
        if last is None:
            raise DataError(f"{self.path} holds no frame.", "Replace or re-encode the file.")
        yield last
        missing_s = self.duration_s - last.end_s
        if missing_s > max(2 * self.interval_s, 0.02 * self.duration_s):
            whole = f"{last.end_s:.2f} s of {self.duration_s:.2f} s"
            raise DataError(f"{self.path} is truncated after {whole}.", "Copy it again or re-encode it.")

    def _decode_from(self, start_s: float) -> Iterator[_Shown]:
        if start_s > 0:
            ticks = int((self.origin_s + start_s) / self.stream.time_base)
            self.container.seek(ticks, stream=self.stream)
            frames = self._decode()
            first = next(frames, None)
            if first is not None and first.start_s <= start_s:
                yield first
                yield from frames
                return
            # A stream without an index (MPEG-TS) can land behind the wanted time.
            self.container.seek(0, stream=self.stream)
        yield from self._decode()

    def _decode(self) -> Iterator[_Shown]:
        time_s = -self.interval_s
        for count, frame in enumerate(self.container.decode(self.stream)):
            if count == self.limits.max_decoded_frames:
                raise DataError(f"{self.path} needs more than {count} frames decoded.", "Cut it into shorter clips.")
            known = frame.pts is not None
            time_s = self._seconds(frame.pts) - self.origin_s if known else time_s + self.interval_s
            yield _Shown(frame, time_s, time_s + (self._seconds(frame.duration or 0) or self.interval_s))

    def rgb(self, shown: _Shown) -> np.ndarray:
        """uint8 ``[H,W,3]``, turned and stretched as a player would."""
        frame = shown.frame
        if frame.is_corrupt:
            raise DataError(f"{self.path} is damaged at {shown.start_s:.3f} s.", "Replace or re-encode the file.")
        if frame.color_trc in _HDR_TRANSFERS:
            kind = _HDR_TRANSFERS[frame.color_trc]
            raise DataError(f"{self.path} is HDR ({kind}).", "Tone-map it to SDR (BT.709) first.")
        matrix = frame.colorspace
        if matrix == _UNSPECIFIED:  # untagged: BT.709 from HD upwards, as players assume
            matrix = Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
        converted = self._reformatter.reformat(
            frame,
            width=max(1, round(frame.width * self.aspect)),
            format="rgb24",
            src_colorspace=int(matrix),
            dst_color_range=ColorRange.JPEG,
            interpolation=_FILTER,
            threads=1,
        )
        return _oriented(converted.to_ndarray(), frame)


def _oriented(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Apply the display matrix: x' = a x + c y, y' = b x + d y, in its eight right-angled cases."""
    side_data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if side_data is None:
        return image
    a, b, _, c, d, *_ = np.frombuffer(side_data, np.int32).tolist()
    if abs(a) < abs(c):
        image, a, d = image.transpose(1, 0, 2), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


@contextmanager
def _open(path: Path | str, limits: Limits) -> Iterator[_Source]:
    """An opened file whose every FFmpeg error becomes a DataError."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"Video {path} does not exist.", "Check the path.")
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": _FORMATS,
        "max_pixels": str(limits.max_pixels),
    }
    try:
        with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
            yield _Source(path, container, limits)
    except av.FFmpegError as error:
        raise DataError(f"{path} cannot be decoded ({error.strerror}).", "Replace or re-encode the file.") from error


def probe(path: Path | str, limits: Limits = Limits()) -> VideoInfo:
    """What the header says, and the first frame's shape as shown.

    Raises:
        DataError: not a readable video.
    """
    with _open(path, limits) as source:
        height, width, _ = source.rgb(next(source.timeline())).shape
        return VideoInfo(width, height, source.fps, source.duration_s, source.stream.codec_context.name)


def frames_at(
    path: Path | str, fps: float, start_s: float, num_frames: int, limits: Limits = Limits()
) -> Iterator[np.ndarray]:
    """The frame on screen at ``start_s + k / fps`` for k = 0, 1, ...: the latest one not after that time.

    Only the span asked for is decoded, from the key frame before it. A frame shown twice is the same array.

    Args:
        path: the file.
        fps: of the samples, independent of the file's own rate.
        start_s: seconds after the stream's start.
        num_frames: how many.

    Yields:
        uint8 ``[H,W,3]`` RGB.

    Raises:
        DataError: unreadable, damaged, over a limit, or ended before ``num_frames``.
    """
    count, end_s = 0, 0.0
    with _open(path, limits) as source:
        for shown in source.timeline(start_s):
            image, end_s = None, shown.end_s
            while count != num_frames and start_s + count / fps < end_s - _CLOCK_ERROR_S:
                image = source.rgb(shown) if image is None else image
                yield image
                count += 1
            if count == num_frames:
                return
    raise DataError(f"{path} ends at {end_s:.2f} s, {num_frames - count} frames early.", "Use a longer clip.")


def read_video(path: Path | str, limits: Limits = Limits()) -> Video:
    """The whole clip at its own rate; a variable rate is sampled at its average (see :func:`frames_at`).

    Raises:
        DataError: unreadable, damaged, empty, or over a limit.
    """
    starts, frames, end_s = [], [], 0.0
    with _open(path, limits) as source:
        for shown in source.timeline():
            starts.append(shown.start_s)
            frames.append(source.rgb(shown))
            end_s = shown.end_s
            if frames[0].shape != frames[-1].shape:
                raise DataError(f"{path} changes its frame size.", "Re-encode the file.")
            if len(frames) * frames[0].nbytes > limits.max_bytes:
                raise DataError(f"{path} decodes to more than {limits.max_bytes} bytes.", "Cut it into shorter clips.")
        fps = source.fps
    measured = len(frames) / (end_s - starts[0])
    fps = fps if abs(measured - fps) < 0.02 * fps else measured
    if np.abs(np.diff(starts) * fps - 1).max(initial=0.0) > 0.5:
        wanted = starts[0] + np.arange(round((end_s - starts[0]) * fps)) / fps + _CLOCK_ERROR_S
        frames = [frames[i] for i in np.searchsorted(starts, wanted, side="right") - 1]
    return Video(np.stack(frames), fps)


def frame_rate(fps: float) -> Fraction:
    """The exact rate meant by a float: 30, or 24000/1001 for 23.976."""
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    if abs(fps - round(fps)) > 1e-4 and abs(fps - ntsc) < 2e-3:
        return ntsc
    return Fraction(fps).limit_denominator(1000)


def write_video(path: Path | str, frames: np.ndarray, fps: float, *, codec: str = "libx264", crf: int = 12) -> None:
    """Write a clip, whole or not at all: to a temporary file, synced, then renamed.

    BT.709, limited range, 4:2:0; an odd size is kept exactly by writing 4:4:4. The bytes do not depend on the
    number of processors.

    Args:
        path: the suffix chooses the container (``.mp4``, ``.mkv``, ``.webm``); the folder is created.
        frames: uint8 ``[F,H,W,3]`` RGB, F >= 1.
        fps: frames per second, kept exactly.
        codec: FFmpeg's encoder name.
        crf: constant quality, 0 (best) to 51; 12 is close to invisible.

    Raises:
        DataError: the encoder refuses this size.
        StorageError: the file cannot be written.
    """
    if codec == "libx265" and min(frames.shape[1:3]) < _X265_MIN_SIDE:
        raise DataError(f"libx265 cannot encode {frames.shape[2]}x{frames.shape[1]} frames.", "Use libx264.")
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3 and len(frames) > 0
    path = Path(path)
    partial = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _encode(partial, frames, frame_rate(fps), codec, crf)
        sync(partial)
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror}).", "Free space or choose a folder.") from error
    except av.FFmpegError as error:
        size = f"{frames.shape[2]}x{frames.shape[1]}"
        raise DataError(f"{codec} cannot encode {size} frames ({error.strerror}).", "Use libx264.") from error
    finally:
        partial.unlink(missing_ok=True)


def _encode(path: Path, frames: np.ndarray, rate: Fraction, codec: str, crf: int) -> None:
    _, height, width, _ = frames.shape
    layout = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
    faststart = {"movflags": "+faststart"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=faststart) as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": str(crf), **_REPEATABLE.get(codec, {})})
        stream.width, stream.height, stream.pix_fmt = width, height, layout
        context = stream.codec_context
        context.thread_count = 1  # x264 decides differently with more
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        reformatter = VideoReformatter()
        for index, image in enumerate(frames):
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24"),
                format=layout,
                src_color_range=ColorRange.JPEG,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_FILTER,
                threads=1,
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
