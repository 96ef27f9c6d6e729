"""What all figures share: how their axes are dressed, and how they reach the disk."""

import os
import pathlib


def label_axes(panel, x: str, y: str) -> None:
    """Names the axes of a panel, and takes the frame above and to the right away."""
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def save_figure(figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG; the file is replaced when the new one is complete."""
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, path)
