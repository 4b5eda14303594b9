"""`python -m website.viewer`: a CT and our label map in ITK-SNAP, as a picture.

ITK-SNAP runs on a virtual display, driven by keys; what it took from our `labels.itksnap.txt` it
must write again the same. Debian bullseye has it and all it needs, bookworm has not; for `--root`:

    mmdebstrap --variant=minbase --include=itksnap,xvfb,xauth,xdotool,imagemagick,libgl1-mesa-dri \\
        bullseye FOLDER
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

_LINE = re.compile(
    r"\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+([01])\s+([01])\s+\"([^\"]*)\"\s*"
)
_NEEDED = "itksnap xvfb-run xauth xdotool import"
# Folder and cursor are the arguments. Places are those of ITK-SNAP 3.6 with Debian's fonts.
_SESSION = r"""
export HOME="$1" LIBGL_ALWAYS_SOFTWARE=1
cd "$1"
window() { xdotool search --sync --onlyvisible --name "$1" | tail -n 1; }
on() { xdotool windowfocus "$1"; shift; sleep 1; xdotool "$@"; sleep 1; }
itksnap -g ct.nii.gz -s labels.nii.gz -l labels.txt &
on "$(window 'Automatic Update')" key alt+n
main=$(window '^ct')
xdotool windowmove "$main" 0 0
on "$main" key ctrl+j                                    # contrast
at=38
for index in $2; do                                      # the cursor's voxel
    on "$main" mousemove $at 230 click --repeat 3 --delay 50 1 type "$index"
    on "$main" key Return
    at=$((at + 56))
done
on "$main" mousemove 225 686 click 1                     # surfaces
on "$main" mousemove 130 12 click 1 key --delay 200 Up Up Up Up Return
save=$(window 'Save Label')                              # Segmentation > Export Label Descriptions
on "$save" key ctrl+a
on "$save" type saved.txt
on "$save" key Return
on "$main" key ctrl+l
xdotool windowmove "$(window 'Label Editor')" 912 0
sleep 3
import -window root picture.png
"""


def read_itksnap(path: Path) -> dict[int, tuple[tuple[int, int, int], str]]:
    """Label -> (colour, name), by the format that ITK-SNAP writes at the head of such a file: IDX,
    R, G, B of 0 to 255, A of 0 to 1, VIS and MSH of 0 or 1, and the name in quotes.

    Raises:
        ValueError: a line is none of that.
    """
    found = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if line.startswith("#") or not line.strip():
            continue
        fields = _LINE.fullmatch(line)
        if fields is None or max(map(int, fields.group(2, 3, 4))) > 255 or float(fields[5]) > 1:
            raise ValueError(f"{path}, line {number} is no label description: {line!r}")
        red, green, blue = map(int, fields.group(2, 3, 4))
        found[int(fields[1])] = ((red, green, blue), fields[8])
    return found


def missing(root: Path | None) -> list[str]:
    """The programs that are not there."""
    script = f"for name in {_NEEDED}; do command -v $name >/dev/null || echo $name; done"
    command = [*_entered(root), "sh", "-c", script]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def draw(ct: Path, labels: Path, names: Path, output: Path, root: Path | None = None) -> None:
    """Writes the picture.

    Args:
        ct: NIfTI, compressed.
        labels: label map that `pipeline predict` wrote.
        names: `labels.itksnap.txt`, which it wrote, too.
        output: PNG.
        root: a Debian that has the programs; None: they are on PATH.

    Raises:
        RuntimeError: ITK-SNAP has other labels than `names`.
    """
    array = np.asarray(nib.load(labels).dataobj)
    cursor = " ".join(str(1 + _fullest(array, axis)) for axis in range(3))
    with tempfile.TemporaryDirectory(dir=root and root / "tmp") as made:
        folder = Path(made)
        shutil.copy(ct, folder / "ct.nii.gz")
        shutil.copy(labels, folder / "labels.nii.gz")
        shutil.copy(names, folder / "labels.txt")
        seen = folder if root is None else Path("/tmp", folder.name)
        display = ["timeout", "300", "xvfb-run", "-a", "-s", "-screen 0 1460x700x24"]
        command = [*_entered(root), *display, "sh", "-c", _SESSION, "sh", str(seen), cursor]
        subprocess.run(command, check=True, capture_output=True)
        saved = read_itksnap(folder / "saved.txt")
        if saved != read_itksnap(names):
            raise RuntimeError(f"ITK-SNAP made of {names}: {saved}")
        shutil.copy(folder / "picture.png", output)


def _entered(root: Path | None) -> list[str]:
    """Without a network, the displays of other programs are out of reach."""
    return [] if root is None else ["unshare", "--net", "chroot", str(root)]


def _fullest(labels: npt.NDArray[np.integer], axis: int) -> int:
    """The slice with the most labels; of several, that with the most voxels of labels."""
    slices = np.moveaxis(labels, axis, 0)
    return max(range(len(slices)), key=lambda n: (np.unique(slices[n]).size, (slices[n] > 0).sum()))


def main() -> None:
    """CT, label map, names, PNG."""
    parser = argparse.ArgumentParser(prog="website.viewer", description=__doc__)
    for name in ("ct", "labels", "names", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--root", type=Path, help="a Debian that has the programs; needs root")
    chosen = parser.parse_args()
    if absent := missing(chosen.root):
        sys.exit(f"No picture: {', '.join(absent)} not found.\n\n{__doc__}")
    draw(chosen.ct, chosen.labels, chosen.names, chosen.output, chosen.root)


if __name__ == "__main__":
    main()
