"""`restkv quantize`: a checkpoint whose matrices take 8 or 4 bits a number."""

from __future__ import annotations

from typing import Annotated

import typer

from restkv.cli.groups import spread
from restkv.cli.options import FILE_NAME, DtypeOption
from restkv.cli.terminal import put_line, status


@spread
def quantize(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A checkpoint folder, or a name to download (see generate)."),
        FILE_NAME,
    ],
    out: Annotated[str, typer.Argument(metavar="FOLDER", help="Where to: a folder that is not there yet."), FILE_NAME],
    weights: Annotated[str, typer.Option(help="int8 or int4.")] = "int8",
    dtype: DtypeOption = "auto",
) -> None:
    """Write a checkpoint with its matrices in 8 or 4 bits, which every command then takes as it does any other."""
    from restkv.cli.display import byte_text
    from restkv.saving.checkpoint import quantize as write

    size = write(model, out, weights, dtype, status.progress("quantising the weights", byte_text))
    put_line(f"{out}: {weights}, {byte_text(size)}")
