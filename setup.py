"""Package list only: maps the top-level folders into the `unitok` namespace (metadata is in pyproject.toml)."""

from setuptools import find_packages, setup

FOLDERS = ("tokenizer", "mllm", "data", "eval", "configs", "scripts", "assets")

packages = ["unitok", *(f"unitok.{name}" for name in find_packages("unitok"))]
package_dir = {"unitok": "unitok"}
for folder in FOLDERS:
    packages += [f"unitok.{folder}", *(f"unitok.{folder}.{name}" for name in find_packages(folder))]
    package_dir[f"unitok.{folder}"] = folder

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        "unitok.configs": ["**/*.yaml"],
        "unitok.assets": ["shapes-mini/**/*"],
        "unitok": ["**/*.html", "**/*.j2", "**/*.css", "**/*.js"],
        "unitok.eval": ["*.j2"],
        "unitok.eval.lm_eval_tasks": ["*.yaml"],
    },
)
