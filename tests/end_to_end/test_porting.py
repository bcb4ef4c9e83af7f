"""docs/porting.md is run as it stands, and what it computes is the paper's formula."""

import re
from pathlib import Path

import torch
from torch.nn import functional as F

PAGE = Path(__file__).parents[2] / "docs" / "porting.md"


def test_the_page_runs_and_is_the_formula() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 1
    new = blocks[0].split("# ---- new")[1]
    lines = [line for line in new.splitlines()[1:] if line.strip()]
    assert len(lines) <= 40, f"the page promises 40 lines, these are {len(lines)}"
    space: dict = {}
    exec(compile(blocks[0], str(PAGE), "exec"), space)
    assert space["losses"][-1] < 0.8 * space["losses"][0]

    # The same loss, written out as in the paper for one position after the other.
    model, objective, ids, features = (space[k] for k in ("model", "objective", "ids", "features"))
    first = space["FIRST_CODE"]
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True)
        cross_entropies, distances = [], []
        for row in range(len(ids)):
            own = []
            for t in range(ids.shape[1] - 1):
                if ids[row, t + 1] < first:
                    continue
                log_p = outputs.logits[row, t].log_softmax(-1)
                cross_entropies.append(-log_p[ids[row, t + 1]])
                projected = objective.projectors["clip@1"](outputs.hidden_states[1][row, t])
                own.append(1 - F.cosine_similarity(projected, features[row], dim=0))
            assert len(own) == 16
            distances.append(torch.stack(own).mean())
        wanted = torch.stack(cross_entropies).mean() + torch.stack(distances).mean()
        batch = space["batch_of"](ids)
        last = model.model(ids).last_hidden_state
        feature = space["Feature"](features, space["mean"], space["constant"])
        terms = objective(space["taps"], last, model.lm_head, batch, {"clip": feature})
    torch.testing.assert_close(terms.total(), wanted, rtol=1e-5, atol=1e-6)
