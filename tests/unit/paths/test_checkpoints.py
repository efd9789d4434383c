"""What is taken over from the run whose checkpoints are scored."""

from small_stores import STARS, make_store
from trl_dynamics.paths.checkpoints import recorded_run


def test_the_frozen_tokens_of_a_run_are_those_of_its_records(tmp_path):
    store = make_store(tmp_path, steps=(10, 20))
    assert recorded_run(str(tmp_path)).star_ids == STARS
    store.drop_after(5)
    assert recorded_run(str(tmp_path)).star_ids is None
