"""Figures of gains: tokens per second as a multiple of 16 bits', a line each, named at its end."""

from __future__ import annotations

from collections.abc import Mapping

from helpers.base.figure import Figure, batch_axis, panels
from helpers.compare.advise import advise
from helpers.model.schemes import look


def gain_lines(
    found: Mapping[str, tuple[str, Mapping[int, tuple[float, float, float]]]], title: str
) -> Figure:
    """Draw gains against the requests at once.

    Args:
        found: by a line's name its scheme and, by batch, the gain, the lowest and the highest.
    """
    figure, [[axes]] = panels(size=(8, 4))
    ends = []
    for name, (scheme, gains) in found.items():
        batches, values = list(gains), [gain for gain, _, _ in gains.values()]
        reach = [
            [gain - low for gain, low, _ in gains.values()],
            [high - gain for gain, _, high in gains.values()],
        ]
        axes.errorbar(batches, values, reach, capsize=3, **look(scheme))
        ends.append((values[-1], batches[-1], f"{name}, {values[-1]:.2f}", look(scheme)["color"]))
    lowest = 0.0
    style = {"va": "center", "fontsize": 11, "bbox": {"color": "white", "pad": 0.5}}
    for value, batch, text, colour in sorted(ends):  # from below, each a line's height above the last
        lowest = max(value, lowest)
        axes.annotate(text, (batch, value), (batch * 1.12, lowest), color=colour, **style)
        lowest += 0.09 * max(end[0] for end in ends)
    axes.axhline(1, color="#555555", linewidth=1)
    axes.text(1, 1, "16 bits", va="bottom", color="#555555")
    batch_axis(axes, sorted({batch for _, gains in found.values() for batch in gains}))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(right=7 * max(batch for _, gains in found.values() for batch in gains))
    axes.set(ylabel="tokens per second, 16 bits = 1", title=title)
    axes.set_ylim(bottom=0)
    words = "; ".join(
        f"{name} {', '.join(f'{gain:.2f} at {batch}' for batch, (gain, _, _) in gains.items())}"
        for name, (_, gains) in found.items()
    )
    return Figure(figure, f"{title}. Gains over 16 bits by requests at once: {words}.", exact=True)


def on_record(origins: Mapping[str, list[dict]], schemes: Mapping[str, str], most: int = 64) -> dict:
    """The gains of recorded machines for ``gain_lines``, with what the slowest and fastest runs allow.

    Args:
        origins: ``records.by_origin``, those to draw; ``schemes``: how to call each scheme drawn.
    """
    found = {}
    for title, rows in origins.items():
        by = {(row["scheme"], row["batch"]): row for row in rows if row["batch"] <= most}
        for name, called in schemes.items():
            pairs = {
                b: (by[name, b], by["baseline", b])
                for s, b in sorted(by, key=lambda k: k[1])
                if s == name and ("baseline", b) in by
            }
            gains = {
                batch: (
                    one["output_tokens_per_s"] / base["output_tokens_per_s"],
                    one["low"] / base["high"],
                    one["high"] / base["low"],
                )
                for batch, (one, base) in pairs.items()
            }
            if gains:
                found[f"{called}, {title.partition(' on ')[0]}"] = name, gains
    return found


def estimated(
    model: str, gpu: str, schemes: Mapping[str, str], users: tuple[int, ...] = (1, 4, 16, 64)
) -> dict:
    """What ``advise`` expects of a model on a card, for ``gain_lines``; contexts so short that all fit."""
    found: dict = {called: (name, {}) for name, called in schemes.items()}
    for count in users:
        asked = advise(model, gpu, context=256, users=count)
        for one in asked.options:
            if one.scheme in schemes:
                ratio = (one.together or one.alone).ratio
                found[schemes[one.scheme]][1][count] = (ratio, ratio, ratio)
    return found
