"""Scenes, samples and the benchmarks' readers (`threedr1.datasets`)."""

if __name__ == "datasets":
    raise ImportError(
        "This is 3D-R1's own `datasets` folder, imported under the bare name `datasets`, where Hugging Face's "
        "library is expected. Take the 3D-R1 checkout off PYTHONPATH, or start Python from another folder; "
        "use `python main.py`, or `import threedr1` after `pip install -e .`."
    )
