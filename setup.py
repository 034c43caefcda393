"""Packaging: what it says is read from settings.ini. A wheel carries the notebooks and the data inside the package."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SHARED = ("nbs", "data")  # in a wheel below persona_steer/share, where base.core finds them

config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {name.removesuffix("_requirements"): cfg[name].split() for name in cfg if name.endswith("_requirements")}


class BuildWithShared(build_py):
    "Copies notebooks and data into the built package; an editable install uses those of the checkout."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        share = Path(self.build_lib) / cfg["lib_name"] / "share"
        shutil.rmtree(share, ignore_errors=True)  # a build folder may hold files that have been removed since
        for name in SHARED:
            shutil.copytree(HERE / name, share / name, ignore=shutil.ignore_patterns(".*", "__pycache__", "_proc"))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="MIT",
    keywords=cfg["keywords"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {version}" for version in cfg["python_versions"].split()),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    include_package_data=False,  # MANIFEST.in is about the sdist
    package_data={cfg["lib_name"]: ["py.typed", "reports/templates/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    cmdclass={"build_py": BuildWithShared},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
        "vllm.general_plugins": [f"{cfg['lib_name']}={cfg['lib_name']}.serving.plugin:register"],
    },
)
