"""Two ranks of lm-eval answer as one process does."""

import pytest
from ranks import run_ranks
from test_eval_lm_model import make_pipeline

DOCUMENTS = 7


def answers(folder, device="cpu"):
    """Answers by document, on rank 0. Drawn, so that a wrong generator would show."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from unitok.commands.lm_eval import task_folders
    from unitok.core.distributed import init_distributed, shutdown_distributed
    from unitok.eval.lm_eval_model import UniTokLM

    init_distributed("cpu")
    lm = UniTokLM(make_pipeline(folder), batch_size=3)
    found = simple_evaluate(
        lm,
        tasks=["unitok_shapes"],
        task_manager=TaskManager(include_path=task_folders(), include_defaults=False),
        limit=DOCUMENTS,
        gen_kwargs={"do_sample": True, "temperature": 1.5, "max_gen_toks": 6},
        bootstrap_iters=0,
    )
    shutdown_distributed()
    return None if found is None else {one["doc_id"]: one["resps"][0][0] for one in found["samples"]["unitok_shapes"]}


@pytest.mark.slow
def test_two_ranks_answer_as_one(tmp_path):
    (one,) = run_ranks(1, answers, tmp_path)
    both, nothing = run_ranks(2, answers, tmp_path)
    assert nothing is None
    assert both == one and len(one) == DOCUMENTS and len(set(one.values())) > 2
