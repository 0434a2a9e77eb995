"""What losses beyond reconstruction compare with: columns of the model; `test_invariants.py` has their formulas."""

from typing import Any

import pytest
import torch
from datasets import Dataset

from sae_lens_writesae import collect, train, training_config
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.rows import COLUMN_SCALE, head_rows, read_queries

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LAYER, HEAD, K, V = 1, 2, 8, 6


# -- columns, and training from a collection


def test_a_rule_that_reads_first_is_given_the_next_query() -> None:
    from hookpoints.recurrence.recurrence import Recurrence

    q = torch.randn(1, 5, 1, K)
    r = Recurrence(q=q, k=torch.randn(1, 5, 1, K), u=torch.randn(1, 5, 1, V), read_before_write=True)
    assert torch.equal(read_queries(r)[:, :-1], q[:, 1:]) and not read_queries(r)[:, -1].any()


@pytest.fixture
def collection(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    ids = torch.randint(1, 64, (40, 32), generator=torch.Generator().manual_seed(0))
    return collect(model, ids, [LAYER], [HEAD], tmp_path_factory.mktemp("collection"), targets=("write", "state"))


def config(source: Any, **fields: Any) -> Any:
    runner: dict[str, Any] = {"training_tokens": 3840, "train_batch_size_tokens": 64, "n_batches_in_buffer": 8}
    runner |= {"context_size": 32, "store_batch_size_prompts": 2, "verbose": False, "lr": 1e-2, "d_sae": 48}
    return training_config(source, LAYER, HEAD, **runner | fields)


@pytest.mark.parametrize("target", ["state", "write"])
@pytest.mark.parametrize("loss", ["reads", "write"])
def test_columns_are_the_models_own_queries_and_writes(model: Any, tokens: Any, target: Any, loss: Any) -> None:
    name = f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_{target}_vec"
    names = [name, f"blocks.{LAYER}.mixer.hook_q", name.replace("state", "write")]
    _, cache = model.run_with_cache(tokens[:, :32], names_filter=names)
    rows = head_rows(model.recurrence(tokens[:, :32], LAYER).select(heads=HEAD), target, loss, slice(-3, None))
    columns = cache[names[1]][:, :, HEAD] if loss == "reads" else cache[names[2]]
    expected = torch.cat([cache[name], COLUMN_SCALE * columns], -1)[:, -3:]
    size = torch.ones(rows.shape[-1])
    size[: K * V] = COLUMN_SCALE
    torch.testing.assert_close(rows * size, expected * size, atol=1e-11, rtol=1e-5)


def test_rows_without_what_loss_or_metric_need_are_refused(model: Any, collection: Any) -> None:
    for fields in ({"loss": "reads"}, {"metric": "gauss_newton"}):
        cfg = config(model, training_tokens=64, **fields)
        ids = torch.randint(1, 64, (40, 32), generator=torch.Generator().manual_seed(0))
        with pytest.raises(ValueError, match="collection"):
            train(cfg, (model, Dataset.from_dict({"tokens": ids.tolist()})))
    with pytest.raises(ValueError, match="metric, checkpoint: expected"):
        train(config(model), (model, None), metric=Metric.of(torch.eye(K), torch.eye(V), 1.0, 0.1, 8))
    for fields in ({"context_size": 16}, {"exclude_special_tokens": [3]}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            train(config(collection, **fields))
