"""The console script `writesae`, also `python -m writesae`.

It lies beside the package because `import sae_lens_writesae` loads torch, SAELens and every evaluation, which takes
seconds; while this module is loaded, the package leaves that to the commands.
"""


def main() -> None:
    """Run a command of `sae_lens_writesae.cli`."""
    from sae_lens_writesae.cli import main

    main()


if __name__ == "__main__":
    import writesae  # under its own name, by which the package knows it

    writesae.main()
