"""fastrnn's Triton kernels, one module per cell. The folder installs as ``fastrnn.kernels``; import it by that name.

The name ``kernels`` on the package index belongs to another project, so an import of the bare folder is refused.
"""

if __name__ == "kernels":
    raise ImportError(
        "fastrnn's kernels/ folder was imported as `kernels` from a source checkout. Import `fastrnn.kernels` instead: "
        "`make build` (or `pip install --no-build-isolation -e .`) makes that name resolve. If you meant the package "
        "`kernels` of the package index, run from another directory than this checkout."
    )
