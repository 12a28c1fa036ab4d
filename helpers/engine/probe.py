"""What the helpers look at inside a running engine, in whatever process that lives.

vLLM mixes ``Probe`` into its worker (``worker_extension_cls``); its methods are then called by name
through ``LLM.collective_rpc``. It computes nothing until it is asked, and changes no result.
"""

import numpy as np

PROBE = "helpers.engine.probe.Probe"  # what open_engine passes to vLLM

ROWS = 64  # positions compared at a time: 64 x 151,936 float32 are 39 MB, several of which are alive


class Probe:
    """Methods vLLM adds to its worker, wherever that lives (``worker_extension_cls``).

    Called by name through ``LLM.collective_rpc``, so that nothing has to be pickled into a child.
    """

    def tap_arm(self, job: dict) -> None:
        """Have the next prompt's logits turned into figures; ``job`` are ``figures``' arguments."""
        model, self._tapped = self.get_model(), None
        vars(model).pop("compute_logits", None)  # a tap that an interrupted prefill left behind
        original = model.compute_logits

        def compute_logits(*args, **kwargs):
            logits = original(*args, **kwargs)
            # The same method computes the one row that is sampled from; the prompt's come in one piece.
            if logits is not None and len(logits) >= len(job["targets"]):
                self._tapped = figures(logits[: len(job["targets"])], **job)
                vars(model).pop("compute_logits", None)
            return logits

        model.compute_logits = compute_logits

    def tap_take(self) -> dict | None:
        """Return the figures, once; None from a worker that never sees logits."""
        taken, self._tapped = self._tapped, None
        return taken

    def profile_start(self) -> None:
        """Note every kernel on this worker's GPU from now on."""
        import torch

        self._steps, original = 0, self.model_runner.execute_model
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

        def execute_model(*args, **kwargs):
            self._steps += 1
            return original(*args, **kwargs)

        self.model_runner.execute_model = execute_model
        self._profile.start()

    def profile_stop(self) -> dict:
        """Return the steps since, and each kernel's name, count and microseconds, longest first."""
        self._profile.stop()
        vars(self.model_runner).pop("execute_model", None)
        events = self._profile.key_averages()
        rows = [(event.key[:120], event.count, event.self_device_time_total) for event in events]
        rows = sorted((row for row in rows if row[2]), key=lambda row: -row[2])
        return {"steps": self._steps, "kernels": [*rows[:40], ("others", 0, sum(r[2] for r in rows[40:]))]}

    def weights_bytes(self) -> int | None:
        """Return vLLM's own figure for the weights on this worker's GPU; its log rounds it to 10 MiB."""
        return getattr(self.model_runner, "model_memory_usage", None)


def figures(logits, targets, keep=None, against=None, row=0, choices=()) -> dict[str, list]:
    """Return per-position figures of logits (positions x vocabulary), in nats.

    Args:
        targets: the token that really comes next at each position.
        keep: a ``.npy`` file whose rows from ``row`` on receive the log-probabilities as float16.
        against: such a file of the baseline; gives KL(baseline || this) over the whole vocabulary.
        choices: pairs of a position and token ids whose log-probabilities are wanted there.
    """
    import torch

    stored = np.load(keep or against, mmap_mode="r+" if keep else "r") if keep or against else None
    rows = dict(choices)
    found: dict[str, list] = {name: [] for name in ("nll", "top1", "kl", "choices")}
    for start in range(0, len(targets), ROWS):
        part = slice(start, start + ROWS)
        ours = torch.log_softmax(logits[part].float(), dim=-1)
        wanted = torch.tensor(targets[part], device=ours.device)
        found["nll"] += (-ours.gather(1, wanted[:, None])[:, 0]).tolist()
        found["top1"] += ours.argmax(dim=-1).tolist()
        found["choices"] += [ours[p - start, rows[p]].tolist() for p in rows if start <= p < start + ROWS]
        place = slice(row + start, row + start + len(ours))
        if keep:
            stored[place] = ours.to(torch.float16).cpu().numpy()
        elif against:
            theirs = torch.from_numpy(np.array(stored[place])).to(ours.device)
            theirs = torch.log_softmax(theirs.float(), dim=-1)  # rounded to float16 they sum to 1 no more
            found["kl"] += (theirs.exp() * (theirs - ours)).sum(dim=-1).tolist()
    return found
