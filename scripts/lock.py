"""Write the lists of packages in `requirements/` from the pyproject.toml files and the `.in` files.

The result follows from these files and from `exclude-newer` in the root pyproject.toml. It names
versions and hashes, never an address, so that it installs from any index or mirror.
"""

from __future__ import annotations

import setup

# Installed apart, see setup.py: each machine needs another build of these.
TORCH = ("torch", "torchaudio", "torchcodec", "torchvision")
LEFT_OUT = ("opencv-python-headless", "triton")
SIBLINGS = ("rbee-contracts", "rbee-job-client", "rbee-job-server")


def compile_list(name: str, *options: str) -> None:
    setup.say(f"requirements/{name}.txt")
    setup.run(
        f"resolving {name}",
        *(setup.UV, "pip", "compile", "--universal", "--generate-hashes", "--upgrade", "--no-emit-index-url"),
        *("--python-version", "3.11", "--custom-compile-command", "make lock"),
        *("--output-file", f"requirements/{name}.txt", *options),
    )


def main() -> None:
    with setup.alone():
        setup.get_uv()
        compile_list("uv", "requirements/uv.in")

        common = [f"{member}/pyproject.toml" for member in setup.members()]
        common += ["--extra", "postgres", "--group", "dev", "--group", "docs"]
        for name in (*SIBLINGS, *TORCH):
            common += ["--no-emit-package", name]
        lean = ["requirements/engine-cpu.in", "--override", "requirements/engine-cpu-overrides.in"]
        for name in LEFT_OUT:
            lean += ["--no-emit-package", name]
        compile_list("engine-cuda", "--extra", "cuda", "requirements/engine-cuda.in", *common)
        compile_list("engine-cpu", "--extra", "cpu", *lean, *common)
        # The machines of one cluster then run the same versions, with an engine or without.
        compile_list("base", "--constraint", "requirements/engine-cuda.txt", *common)


if __name__ == "__main__":
    main()
