"""`python -m website.viewer`: a CT and our label map in a viewer that others wrote, as a picture.

NiiVue reads the NIfTI files, headless Chromium draws them; names and colours are those of
`labels.itksnap.txt`, read as ITK-SNAP documents it. Once, in any folder: `npm install
@niivue/niivue`; and the Debian package chromium.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

_LINE = re.compile(
    r"\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+([01])\s+([01])\s+\"([^\"]*)\"\s*"
)
_PAGE = """<!doctype html>
<body style="margin:0;background:#000;color:#fff;font:18px sans-serif">
<div style="width:1300px;height:420px"><canvas id="c"></canvas></div><p id="names"></p>
<script type="module">
import {{ Niivue }} from "./niivue.js";
const viewer = new Niivue({{ isRadiologicalConvention: true, show3Dcrosshair: false,
  crosshairWidth: 0, backColor: [0, 0, 0, 1], showLegend: true, multiplanarEqualSize: true }});
await viewer.attachToCanvas(document.getElementById("c"));
await viewer.loadVolumes([{{ url: "ct.nii.gz", cal_min: -160, cal_max: 240 }},
  {{ url: "labels.nii.gz", opacity: 0.6 }}]);
viewer.volumes[1].setColormapLabel({names});
viewer.setMultiplanarLayout(3);
viewer.updateGLVolume();
const held = viewer.volumes[1].colormapLabel, line = document.getElementById("names");
held.labels.slice(1).forEach((name, n) => {{
  const [r, g, b] = held.lut.slice(4 * (n + 1));
  const colour = `rgb(${{r}},${{g}},${{b}})`;
  line.insertAdjacentHTML("beforeend", `<b style="color:${{colour}}">&emsp;&#9632;</b> `);
  line.append(name);
}});
</script></body>
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


def niivue_names(path: Path) -> dict[str, list[object]]:
    """The same as NiiVue's table of labels."""
    labels = read_itksnap(path)
    return {
        **{channel: [c[n] for c, _ in labels.values()] for n, channel in enumerate("RGB")},
        "A": [255 if label else 0 for label in labels],
        "I": list(labels),
        "labels": [name if label else "" for label, (_, name) in labels.items()],
    }


def draw(ct: Path, labels: Path, niivue: Path, output: Path) -> None:
    """Writes the picture; the colour file is `labels.itksnap.txt` beside the label map.

    Args:
        ct: NIfTI.
        labels: label map that `pipeline predict` wrote.
        niivue: its folder below node_modules.
        output: PNG.
    """
    names = json.dumps(niivue_names(labels.parent / "labels.itksnap.txt"))
    with tempfile.TemporaryDirectory() as folder:
        served = Path(folder)
        shutil.copy(ct, served / "ct.nii.gz")
        shutil.copy(labels, served / "labels.nii.gz")
        shutil.copy(niivue / "dist" / "index.js", served / "niivue.js")
        (served / "index.html").write_text(_PAGE.format(names=names), "utf-8")
        handler = functools.partial(_Quiet, directory=folder)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            options = [
                "--headless", "--no-sandbox", "--hide-scrollbars", "--use-angle=swiftshader",
                "--enable-unsafe-swiftshader", "--window-size=1300,470", "--timeout=60000",
                f"--user-data-dir={folder}/profile", f"--screenshot={output.resolve()}",
            ]  # fmt: skip
            url = f"http://127.0.0.1:{server.server_port}/index.html"
            subprocess.run(["chromium", *options, url], check=True, capture_output=True)
            server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Requests are of no interest."""


def main() -> None:
    """CT, label map, node_modules/@niivue/niivue, PNG."""
    parser = argparse.ArgumentParser(prog="website.viewer", description=__doc__)
    for name in ("ct", "labels", "niivue", "output"):
        parser.add_argument(name, type=Path)
    chosen = parser.parse_args()
    if shutil.which("chromium") is None or not (chosen.niivue / "dist" / "index.js").is_file():
        sys.exit("No picture: needs Debian's chromium, and NiiVue (npm install @niivue/niivue).")
    draw(chosen.ct, chosen.labels, chosen.niivue, chosen.output)


if __name__ == "__main__":
    main()
