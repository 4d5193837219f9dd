import re
from pathlib import Path

README = Path(__file__).parents[2] / "packages" / "mttl-experts" / "README.md"


def test_the_readme_examples_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["('my_task',) ('my_task',)", "[] ['my_expert']"]
    assert "q_proj.sigma" in shown[-5]
    assert "exact_match" in shown[-5]
    assert "name='e1'" in shown[-4]
    assert shown[-3:-1] == ["['PEFT lora'] [] ['e1']", "['e1'] True"]
    assert re.fullmatch(r"e2 e2 (1\.0|0\.99\d+) (3\.0|2\.99\d+|3\.00\d+) scaled", shown[-1])
