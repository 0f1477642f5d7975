"""What SGL and STAR found, looked for on the shipped pair: `python -m glyphs.findings -o DIR`."""
