"""The program that listens: `python -m` and this module's name. Started by `hearing.Hearing`.

A question is a WAV file. pocketsphinx's model is the American English one of its wheel.
"""

from __future__ import annotations

import io
import sys
import wave
from array import array
from collections.abc import Callable
from itertools import pairwise

from deepseek_api_compat.media.recogniser_child import Refused, serve

RATE = 16_000  # samples per second that the model was made for
FASTEST = 384_000  # samples per second that any sound card makes


def load(arguments: list[str]) -> Callable[[bytes], str]:
    """arguments: the most seconds of sound."""
    import pocketsphinx

    longest = float(arguments[0])
    decoder = pocketsphinx.Decoder(samprate=RATE, loglevel="FATAL")

    def listen(question: bytes) -> str:
        samples = heard(question, longest)
        if not samples:
            return ""
        decoder.start_utt()
        decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return found.hypstr if found is not None else ""

    return listen


def heard(content: bytes, longest: float) -> array[int]:
    """The samples of a WAV file: at RATE, one channel, 16 bits, the machine's byte order. Raises Refused."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError, ValueError, OSError, ArithmeticError) as error:
        raise Refused("The sound can't be read: it is no WAV file of plain PCM, or damaged.") from error
    if width not in (1, 2) or channels not in (1, 2) or not 1000 <= rate <= FASTEST:
        raise Refused("Only WAV files of 8 or 16 bits, mono or stereo, 1 to 384 kHz, are heard here.")
    frames = frames[: len(frames) // (width * channels) * width * channels]
    if (seconds := len(frames) / (width * channels * rate)) > longest:
        raise Refused(f"The sound is {seconds:.0f} s long; at most {longest:g} s are heard here.")
    return resampled(_mono(_samples(frames, width), channels), rate)


def _samples(frames: bytes, width: int) -> array[int]:
    if width == 1:  # unsigned, unlike the others
        return array("h", ((byte - 128) << 8 for byte in frames))
    samples = array("h", frames)
    if sys.byteorder == "big":
        samples.byteswap()
    return samples


def _mono(samples: array[int], channels: int) -> array[int]:
    if channels == 1:
        return samples
    return array("h", ((left + right) >> 1 for left, right in zip(samples[::2], samples[1::2], strict=True)))


def resampled(samples: array[int], rate: int) -> array[int]:
    """From `rate` to RATE: the mean of what falls into a sample's time, or straight lines between samples."""
    if rate == RATE or not samples:
        return samples
    step = rate / RATE
    count = int(len(samples) / step)
    if step > 1:
        edges = [int(number * step) for number in range(count + 1)]
        return array("h", (sum(samples[a:b]) // (b - a) for a, b in pairwise(edges) if b > a))
    result = array("h")
    last = len(samples) - 1
    for number in range(count):
        place = number * step
        before = int(place)
        after = min(before + 1, last)
        result.append(int(samples[before] + (samples[after] - samples[before]) * (place - before)))
    return result


if __name__ == "__main__":
    serve(load)
