"""The original procedure in one function: a CRaFT step of a VLA policy, without the machinery around it.

    minimise L_act(theta)   subject to   L_ret(theta) <= eps

L_act is the L1 error of the actions, L_ret how far the features that the action head reads have moved from those of the
start weights theta_0 on the same batch. `prismatic.training.step` makes the same step for several processes, fp16,
accumulated batches and other settings; tests/test_examples.py shows that the weights are equal bit for bit.
"""

import torch

from prismatic.models.vla_policy import CraftRequest

BUDGET = 0.1  # eps
DUAL_RATE = 0.01  # eta
DELTA = 1e-8  # keeps the projection finite where r is zero


def pool(raw, queries):
    """Features f: the means over the tokens of C_R (B, T, D) and of C_AQ (B, Q, D), each (B, D) fp32."""
    return raw.float().mean(dim=1), queries.float().mean(dim=1)


def craft_step(policy, optimizer, batch, theta_0, lam):
    """Make one optimizer step on a collated batch.

    Args:
        policy: VLAPolicyModel in training mode, with fp32 weights and no gradients yet.
        optimizer: AdamW over its trainable parameters.
        theta_0: `copy.deepcopy(policy).eval()` from before the first step.
        lam: the multiplier lambda, the price of drift; 1.0 in the first step.

    Returns lambda for the next step, and L_act and L_ret of this one.
    """
    with torch.no_grad():
        raw_0, queries_0, _ = theta_0.anchor_features(batch)
    output = policy(batch, CraftRequest())

    pairs = zip(pool(output.raw_latent_features, output.action_query_features), pool(raw_0, queries_0), strict=True)
    l_ret = sum((f - f_0).square().mean(dim=1).mean() for f, f_0 in pairs) / 2
    l_act = (output.actions.float() - batch["actions"].float()).abs().mean()

    # The two gradients are kept apart: a in p.grad, r in a buffer of its own. Only the VLM can move the features. (One
    # buffer, as in the library, since the last bits of a dot product depend on where in memory the numbers begin.)
    vlm = [p for p in policy.vla.parameters() if p.requires_grad]
    grads = torch.autograd.grad(l_ret, vlm, retain_graph=True, allow_unused=True)
    reached = [p for p, r in zip(vlm, grads, strict=True) if r is not None]
    buffer = torch.cat([r.flatten() for r in grads if r is not None])
    l_act.backward()

    # g = a + (c + lambda) r for each tensor. Where a would raise L_ret, c takes that part of it away.
    for p, r in zip(reached, buffer.split([p.numel() for p in reached]), strict=True):
        c = (-torch.dot(p.grad.flatten(), r) / (torch.dot(r, r) + DELTA)).clamp(min=0)
        p.grad.addcmul_(r.view_as(p), c + lam)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return max(0.0, lam + DUAL_RATE * (l_ret.item() - BUDGET)), l_act.item(), l_ret.item()
