"""Builds the native kernel, grokadamw/backends/cpu_kernel.c, as a plain shared library, if there is a C compiler.

It also makes what PyPI shows: the project's URLs, and the README with absolute links.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# The owner fills in the address of the repository here, such as "https://github.com/OWNER/grokadamw", and nowhere else.
# While it is empty, a build has no project URLs, and in the README's copy for PyPI every link into the repository is
# plain text, and every picture its description: they would lead nowhere.
REPOSITORY = ""

ROOT = Path(__file__).parent
VERSION = re.findall(r'^__version__ = "(.+)"$', (ROOT / "grokadamw/__init__.py").read_text(), re.MULTILINE)[0]


def readme() -> str:
    """The README as PyPI shows it: links and pictures that are relative to the repository, at this version's tag."""

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if not REPOSITORY:
            return text
        return f"{picture}[{text}]({REPOSITORY}/{'raw' if picture else 'blob'}/v{VERSION}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)", absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


URLS = {
    "Repository": REPOSITORY,
    "Documentation": f"{REPOSITORY}/blob/v{VERSION}/docs/index.md",
    "Changelog": f"{REPOSITORY}/blob/v{VERSION}/CHANGELOG.md",
    "Issues": f"{REPOSITORY}/issues",
}

# Nobody reads errno or floating-point exceptions, which would keep loops from becoming vectors. Products and sums stay
# apart, for the same bits everywhere; NaN and infinity keep their meaning, so there is no -ffast-math.
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-fno-fast-math",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-pthread",
]
if "-g" not in os.environ.get("CFLAGS", "").split():
    FLAGS.append("-g0")  # Python's own flags ask for debug information, which is two thirds of the library
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}


class BuildKernel(build_ext):
    """One object for each instruction set, in one library that needs no Python: native.py loads it with ctypes."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        objects = []
        for name, flags in INSTRUCTION_SETS.items():
            try:
                objects += self.compiler.compile(
                    ext.sources,
                    output_dir=os.path.join(self.build_temp, name),
                    macros=[("VARIANT", f"_{name}")],
                    extra_postargs=FLAGS + flags,
                    depends=ext.depends,
                )
            except CompileError:
                if name == "baseline":
                    raise
                self.warn(f"the compiler knows no {flags[0]}: the kernel is built without it")
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), libraries=["m"], extra_postargs=["-pthread", "-fno-fast-math"]
        )


class Wheel(bdist_wheel):
    """For every Python, on this platform; on any where nothing was compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        build = self.get_finalized_command("build_ext")
        built = any(Path(build.get_ext_fullpath(ext.name)).exists() for ext in build.extensions)
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    version=VERSION,
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls=URLS if REPOSITORY else {},
    ext_modules=[Extension("grokadamw.backends.cpu_kernel", ["grokadamw/backends/cpu_kernel.c"], optional=True)],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": Wheel},
)
