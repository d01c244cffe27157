"""Rule 15: a sample of the trials of trials.py, which runs all of them."""
import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from trials import COMMANDS, Server, all_trials, attempt  # noqa: E402

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")


@pytest.mark.parametrize("name, processes, tried", [
    *((name, 1, 10) for name in COMMANDS),
    *((name, 2, 2) for name in COMMANDS),
])
def test_struck_anywhere_it_goes_on_to_the_same_end(tmp_path, name, processes, tried):
    """Killed before, after or within a call that changes a file, or on a full disk from there on."""
    server = Server(tmp_path)
    try:
        trials, whole = all_trials(server, [name], processes)
        assert len(trials) > 100
        for trial in random.Random(0).sample(trials, tried):
            assert attempt(server, trial, whole[name]) == "", trial
    finally:
        server.close()
