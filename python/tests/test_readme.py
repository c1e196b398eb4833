import re

from conftest import ROOT


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "python" / "README.md").read_text(), flags=re.S)
    names = {}
    exec(code, names)
    assert names["plain"](names["x"]).shape == (4, 10)
    assert (tmp_path / "adapters.pt").exists() and not hasattr(names["plain"], "pace")
