"""The equations of GRM and of the aligners it is compared with, as plain loops in float64: the oracle of the tests.

Clarity over speed. A score function takes ONE image and ONE caption, a loop walks over tokens, regions and pairs, and
only the feature axis D is handled as a vector. Nothing here is clipped, stabilised or given an epsilon. Inputs are
tensors or nested lists of any float type; results are float64 tensors that keep their gradient. A mask is boolean,
True = real token, None = all real; a padded token is skipped, whatever stands in it.

Equation numbers: GRM, "Cross Modal Fine-Grained Alignment via Granularity-Aware and Region-Uncertain Modeling"
(AAAI 2026, arXiv 2511.07710). Shapes: B images, C captions, Lv patches, Lt words, K regions, D features, H hidden.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

PAPER_LEVEL_WEIGHTS = {"original": 0.4, "key": 0.4, "uncertain": 0.2}


def _f64(values: Any) -> Tensor:
    """`values` as float64, with its gradient."""
    return torch.as_tensor(values, dtype=torch.float64)


def _real(mask: Any, length: int) -> list[int]:
    """Positions of the real tokens. Raises ValueError for the wrong length or no real token: neither has a mean."""
    if mask is None:
        return list(range(length))
    if len(mask) != length:
        raise ValueError(f"the mask must have length {length}, got {len(mask)}.")
    positions = [index for index in range(length) if bool(mask[index])]
    if not positions:
        raise ValueError("the mask leaves no real token, so maximum and mean are undefined. Keep at least one True.")
    return positions


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum()


def _mean(values: Sequence[Tensor]) -> Tensor:
    return sum(values) / len(values)


def _softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    exponentials = [torch.exp(logit) for logit in logits]
    return [exponential / sum(exponentials) for exponential in exponentials]


# --- The bidirectional GRU of SCAN, VSE++ and CHAN ---


def bidirectional_gru(words: Any, weights: dict[str, Tensor]) -> Tensor:
    """The mean of both directions at each word, (Lt, D) -> (Lt, H).

    Args:
        weights: those of a `torch.nn.GRU` of one layer by name, its gates in the order reset, update, new.
    """
    words = list(_f64(words))
    directions = []
    for suffix, sequence in (("", words), ("_reverse", words[::-1])):
        w_in, w_state, b_in, b_state = (
            _f64(weights[f"{kind}_l0{suffix}"]) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        state, states = torch.zeros(w_state.shape[1], dtype=torch.float64), []
        for word in sequence:
            reset_in, update_in, new_in = (w_in @ word + b_in).chunk(3)
            reset_state, update_state, new_state = (w_state @ state + b_state).chunk(3)
            reset = torch.sigmoid(reset_in + reset_state)
            update = torch.sigmoid(update_in + update_state)
            new = torch.tanh(new_in + reset * new_state)
            state = (1 - update) * new + update * state
            states.append(state)
        directions.append(states[::-1] if suffix else states)
    return torch.stack([(forward + backward) / 2 for forward, backward in zip(*directions, strict=True)])


# --- Tokens, saliency (eq. 1) ---


def l2_normalise(tokens: Any) -> Tensor:
    """x / ||x|| for each token, (L, D) -> (L, D); the zero vector stays zero. Before eq. 1 (METHOD, part 2)."""
    rows = []
    for token in _f64(tokens):
        squared_norm = _dot(token, token)
        rows.append(token / torch.sqrt(squared_norm) if squared_norm > 0 else token)
    return torch.stack(rows)


def saliency(tokens_l2: Any, W1: Any, b1: Any, W2: Any, b2: Any, temperature: float = 1.0, noise: Any = None) -> Tensor:
    """Eq. 1: D = W2 GELU(W1 x + b1) + b2 and A = softmax((D + noise) / temperature)[1], per token.

    `tokens_l2` (L, D) already L2-normalised, `W1` (H, D), `b1` (H,), `W2` (2, H), `b2` (2,); exact (erf) GELU.
    `noise` (L, 2) are Gumbel draws, None (test time) means none. Returns (L,) in [0, 1].
    """
    tokens_l2, W1, b1, W2, b2 = _f64(tokens_l2), _f64(W1), _f64(b1), _f64(W2), _f64(b2)
    values = []
    for position, token in enumerate(tokens_l2):
        hidden = []
        for weight, bias in zip(W1, b1, strict=True):
            x = _dot(weight, token) + bias
            hidden.append(x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))
        logits = [_dot(weight, torch.stack(hidden)) + bias for weight, bias in zip(W2, b2, strict=True)]
        if noise is not None:
            logits = [logit + draw for logit, draw in zip(logits, _f64(noise)[position], strict=True)]
        values.append(_softmax([logit / temperature for logit in logits])[1])
    return torch.stack(values)


def apply_saliency(tokens: Any, token_saliency: Any) -> Tensor:
    """Eq. 1, V^ = V * A: every channel of a token times its saliency, (L, D) and (L,) -> (L, D)."""
    return torch.stack([weight * token for token, weight in zip(_f64(tokens), _f64(token_saliency), strict=True)])


# --- Regions (eq. 2-6), one image ---


def region_affinity(tokens_hat: Any, prompts: Any, patch_mask: Any = None, logit_scale: float = 1.0) -> Tensor:
    """Eq. 2: A_r[l, k] = sigmoid(logit_scale * <v^_l, p_k / ||p_k||>).

    `tokens_hat` (Lv, D) patches times saliency, `prompts` (K, D), `patch_mask` (Lv,). Returns (Lv, K) in (0, 1); the
    row of a padded patch is 0, so that it takes part in no region.
    """
    tokens_hat, prompts = _f64(tokens_hat), l2_normalise(prompts)
    real = _real(patch_mask, len(tokens_hat))
    rows = []
    for position, token in enumerate(tokens_hat):
        if position in real:
            rows.append(torch.stack([1 / (1 + torch.exp(-logit_scale * _dot(token, prompt))) for prompt in prompts]))
        else:
            rows.append(torch.zeros(len(prompts), dtype=torch.float64))
    return torch.stack(rows)


def region_assignment(affinity: Any, patch_mask: Any = None) -> Tensor:
    """Eq. 3: A_r^[l, k] = A_r[l, k] / sum over real patches of A_r[., k].

    (Lv, K) -> (Lv, K); each column sums to 1 over the real patches, the row of a padded patch is 0.
    """
    affinity = _f64(affinity)
    real = _real(patch_mask, len(affinity))
    columns = []
    for column in affinity.unbind(1):
        mass = sum(column[position] for position in real)
        columns.append([column[p] / mass if p in real else _f64(0.0) for p in range(len(column))])
    return torch.stack([torch.stack(column) for column in columns], dim=1)


def region_weights(affinity: Any, patch_mask: Any = None) -> Tensor:
    """Mixing coefficients pi_k = N_k / sum_j N_j, N_k = sum over real patches of A_r[., k]: (Lv, K) -> (K,), sum 1.

    METHOD, part 1: the M-step of a Gaussian mixture with responsibilities A_r (after eq. 3).
    """
    affinity = _f64(affinity)
    real = _real(patch_mask, len(affinity))
    masses = [sum(column[position] for position in real) for column in affinity.unbind(1)]
    return torch.stack([mass / sum(masses) for mass in masses])


def region_means(assignment: Any, tokens_hat: Any, patch_mask: Any = None) -> Tensor:
    """Eq. 3: mu_k = sum over real patches of A_r^[l, k] v^_l. (Lv, K) and (Lv, D) -> (K, D)."""
    assignment, tokens_hat = _f64(assignment), _f64(tokens_hat)
    real = _real(patch_mask, len(tokens_hat))
    return torch.stack([sum(column[p] * tokens_hat[p] for p in real) for column in assignment.unbind(1)])


def region_log_vars(means: Any, phi: Callable[[Tensor], Tensor]) -> Tensor:
    """Eq. 4: log sigma_k^2 = phi(mu_k), `phi` a callable (D,) -> (D,) in float64. (K, D) -> (K, D)."""
    return torch.stack([_f64(phi(mean)) for mean in _f64(means)])


def sample_regions_naive(assignment: Any, means: Any, log_vars: Any, eps: Any) -> Tensor:
    """Eq. 5-6 as printed: z_lk = mu_k + eps_lk * exp(log sigma_k^2 / 2), u_k = sum_l A_r^[l, k] z_lk.

    `assignment` (Lv, K), `means` and `log_vars` (K, D), `eps` (Lv, K, D) standard normal draws. Returns U (K, D).
    """
    assignment, means, log_vars, eps = _f64(assignment), _f64(means), _f64(log_vars), _f64(eps)
    regions = []
    for k in range(len(means)):
        region = torch.zeros_like(means[k])
        for patch in range(len(assignment)):
            z = means[k] + eps[patch, k] * torch.exp(log_vars[k] / 2)
            region = region + assignment[patch, k] * z
        regions.append(region)
    return torch.stack(regions)


def sample_regions_reduced(assignment: Any, means: Any, log_vars: Any, eps: Any) -> Tensor:
    """Eq. 5-6 with K draws, equal in distribution: u_k = mu_k + sigma_k sqrt(sum_l (A_r^[l, k])^2) eps_k.

    As `sample_regions_naive`, but `eps` (K, D). Holds because each column of `assignment` sums to 1.
    """
    assignment, means, log_vars, eps = _f64(assignment), _f64(means), _f64(log_vars), _f64(eps)
    regions = []
    for k in range(len(means)):
        squares = sum(weight**2 for weight in assignment[:, k])
        regions.append(means[k] + torch.exp(log_vars[k] / 2) * torch.sqrt(squares) * eps[k])
    return torch.stack(regions)


# --- Similarity (eq. 7) ---


def bidirectional_similarity(words: Any, patches: Any, word_mask: Any = None, patch_mask: Any = None) -> Tensor:
    """Eq. 7 for one image and one caption: mean_w max_v <t_w, v> + mean_v max_w <t_w, v>, over real tokens.

    `words` (Lt, D), `patches` (Lv, D), both used as given. Returns a scalar.
    """
    words, patches = _f64(words), _f64(patches)
    real_words, real_patches = _real(word_mask, len(words)), _real(patch_mask, len(patches))
    best_patch = [max(_dot(words[w], patches[p]) for p in real_patches) for w in real_words]
    best_word = [max(_dot(words[w], patches[p]) for w in real_words) for p in real_patches]
    return _mean(best_patch) + _mean(best_word)


def three_level_similarity(
    words: Any,
    patches: Any,
    word_saliency: Any,
    patch_saliency: Any,
    region_embeds: Any,
    word_mask: Any = None,
    patch_mask: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 7 at three levels for one pair: (S_ori, S_key, S_unc) from (T, V), (T^, V^), (T^, U).

    `words` (Lt, D) and `patches` (Lv, D) before saliency, saliencies (Lt,) and (Lv,), `region_embeds` (K, D).
    """
    words_hat = apply_saliency(words, word_saliency)
    patches_hat = apply_saliency(patches, patch_saliency)
    return (
        bidirectional_similarity(words, patches, word_mask, patch_mask),
        bidirectional_similarity(words_hat, patches_hat, word_mask, patch_mask),
        bidirectional_similarity(words_hat, region_embeds, word_mask),
    )


def level_similarities(
    patch_embeds: Any,
    word_embeds: Any,
    word_mask: Any = None,
    *,
    patch_mask: Any = None,
    patch_saliency: Any = None,
    word_saliency: Any = None,
    region_embeds: Any = None,
) -> Tensor:
    """Eq. 7 for all pairs, levels in the order original, key, uncertain. Returns (levels, B, C).

    `patch_embeds` (B, Lv, D), `word_embeds` (C, Lt, D), masks and saliencies (B, Lv) and (C, Lt), `region_embeds`
    (B, K, D). The key level exists if a saliency is given (the other one then counts as 1), the uncertain level if
    `region_embeds` is given (against words times saliency).
    """
    patch_ones, word_ones = torch.ones(_f64(patch_embeds).shape[:2]), torch.ones(_f64(word_embeds).shape[:2])
    names = level_names(patch_saliency, word_saliency, region_embeds)
    levels: dict[str, list[Tensor]] = {name: [] for name in names}
    for i, patches in enumerate(patch_embeds):
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for t, words in enumerate(word_embeds):
            mask_t = None if word_mask is None else word_mask[t]
            mask_i = None if patch_mask is None else patch_mask[i]
            words_hat = apply_saliency(words, (word_ones if word_saliency is None else word_saliency)[t])
            patches_hat = apply_saliency(patches, (patch_ones if patch_saliency is None else patch_saliency)[i])
            rows["original"].append(bidirectional_similarity(words, patches, mask_t, mask_i))
            if "key" in names:
                rows["key"].append(bidirectional_similarity(words_hat, patches_hat, mask_t, mask_i))
            if "uncertain" in names:
                rows["uncertain"].append(bidirectional_similarity(words_hat, region_embeds[i], mask_t))
        for name in names:
            levels[name].append(torch.stack(rows[name]))
    return torch.stack([torch.stack(levels[name]) for name in names])


def level_names(patch_saliency: Any = None, word_saliency: Any = None, region_embeds: Any = None) -> list[str]:
    """Names of the levels that `level_similarities` returns for these inputs, in its order."""
    names = ["original"]
    if patch_saliency is not None or word_saliency is not None:
        names.append("key")
    if region_embeds is not None:
        names.append("uncertain")
    return names


def token_similarity(
    patch_embeds: Any,
    word_embeds: Any,
    word_mask: Any = None,
    *,
    patch_mask: Any = None,
    patch_saliency: Any = None,
    word_saliency: Any = None,
    region_embeds: Any = None,
    level_weights: Sequence[float] | None = None,
) -> Tensor:
    """a S_ori + b S_key + c S_unc over the levels present, (B, C); the ranking score (METHOD, part 2).

    `level_weights`: one weight per level present, used as given. None: the paper's (0.4, 0.4, 0.2) restricted to the
    levels present and renormalised to sum 1.
    """
    extras = {"patch_saliency": patch_saliency, "word_saliency": word_saliency, "region_embeds": region_embeds}
    levels = level_similarities(patch_embeds, word_embeds, word_mask, patch_mask=patch_mask, **extras)
    if level_weights is None:
        present = [PAPER_LEVEL_WEIGHTS[name] for name in level_names(**extras)]
        level_weights = [weight / sum(present) for weight in present]
    return sum(weight * level for weight, level in zip(level_weights, levels, strict=True))


def var_of_uncertain_score(words_hat: Any, means: Any, log_vars: Any, assignment: Any, word_mask: Any = None) -> Tensor:
    """Variance of S_unc under the noise of eq. 5-6, the arg-maxes of eq. 7 held at U = mu (METHOD, exact fact 3).

    g_k = sum over words w whose best region is k of t^_w / Lt, plus t^_{w*(k)} / K with w*(k) the best word of k;
    Var = sum_k (sum_l (A_r^[l, k])^2) sum_d g_kd^2 sigma_kd^2. Lt counts real words.
    `words_hat` (Lt, D) words times saliency, `means` and `log_vars` (K, D), `assignment` (Lv, K). Returns a scalar.
    """
    words_hat, means, log_vars, assignment = _f64(words_hat), _f64(means), _f64(log_vars), _f64(assignment)
    real_words, num_regions = _real(word_mask, len(words_hat)), len(means)
    gradients = [torch.zeros_like(mean) for mean in means]
    for w in real_words:
        best_region = max(range(num_regions), key=lambda k: _dot(words_hat[w], means[k]))
        gradients[best_region] = gradients[best_region] + words_hat[w] / len(real_words)
    for k in range(num_regions):
        best_word = max(real_words, key=lambda w: _dot(words_hat[w], means[k]))
        gradients[k] = gradients[k] + words_hat[best_word] / num_regions
    variance = _f64(0.0)
    for k in range(num_regions):
        squares = sum(weight**2 for weight in assignment[:, k])
        variance = variance + squares * (gradients[k] ** 2 * torch.exp(log_vars[k])).sum()
    return variance


def mixture_log_density(point: Any, weights: Any, means: Any, log_vars: Any) -> Tensor:
    """log sum_k pi_k N(x; mu_k, sigma_k^2), in nats: the image as a mixture of its regions (METHOD, part 2).

    `point` (D,), `weights` (K,), `means` and `log_vars` (K, D). Returns a scalar.
    """
    point, weights, means, log_vars = _f64(point), _f64(weights), _f64(means), _f64(log_vars)
    density = _f64(0.0)
    for weight, mean, log_var in zip(weights, means, log_vars, strict=True):
        exponent = ((point - mean) ** 2 / torch.exp(log_var) + log_var + math.log(2 * math.pi)).sum() / -2
        density = density + weight * torch.exp(exponent)
    return torch.log(density)


# --- The other aligners (METHOD, part 4), one image and one caption ---


def chan_score(
    words: Any,
    patches: Any,
    word_mask: Any = None,
    patch_mask: Any = None,
    pooling: str = "mean",
    temperature: float = 0.1,
) -> Tensor:
    """CHAN (CVPR 2023), hard alignment: s_w = max over patches of <t_w, v>, pooled over words. Returns a scalar.

    "mean": mean_w s_w. "logsumexp": temperature * log(sum_w exp(s_w / temperature)), a sum, not a mean, so it grows
    with the caption's length and lies in [max s_w, max s_w + temperature * log Lt]. The factor `temperature` keeps the
    scale of a cosine and with it the meaning of a margin; without it scores are 1 / temperature times as large and
    rank alike. Tokens are used as given.
    """
    words, patches = _f64(words), _f64(patches)
    real_words, real_patches = _real(word_mask, len(words)), _real(patch_mask, len(patches))
    best = [max(_dot(words[w], patches[p]) for p in real_patches) for w in real_words]
    if pooling == "mean":
        return _mean(best)
    if pooling == "logsumexp":
        return temperature * torch.log(sum(torch.exp(score / temperature) for score in best))
    raise ValueError(f"`pooling` must be 'mean' or 'logsumexp', got {pooling!r}.")


def vse_score(words: Any, patches: Any, word_mask: Any = None, patch_mask: Any = None, pooling: str = "mean") -> Tensor:
    """VSE++ (BMVC 2018): real tokens pooled per feature ("mean" or "max"), then the cosine. Returns a scalar.

    Tokens are pooled as given, not normalised one by one: only the pooled vectors are. A zero vector scores 0.
    """
    pooled = []
    for tokens, mask in ((_f64(words), word_mask), (_f64(patches), patch_mask)):
        real = _real(mask, len(tokens))
        if pooling == "mean":
            pooled.append(sum(tokens[position] for position in real) / len(real))
        elif pooling == "max":
            columns = tokens.unbind(1)
            pooled.append(torch.stack([max(column[position] for position in real) for column in columns]))
        else:
            raise ValueError(f"`pooling` must be 'mean' or 'max', got {pooling!r}.")
    word, image = l2_normalise(torch.stack(pooled))
    return _dot(word, image)


def scan_score(
    queries: Any,
    contexts: Any,
    query_mask: Any = None,
    context_mask: Any = None,
    inverse_temperature: float = 9.0,
) -> Tensor:
    """SCAN (ECCV 2018): each query attends over the contexts; mean cosine of query and attended context. A scalar.

    Text to image: queries = words, contexts = patches, inverse temperature 9. Image to text: the roles exchanged, 4.
    Attention: leaky ReLU (0.1) of <q, c>, L2-normalised over the queries for each context, softmax over the contexts.
    """
    queries, contexts = _f64(queries), _f64(contexts)
    real_queries, real_contexts = _real(query_mask, len(queries)), _real(context_mask, len(contexts))
    normalised = {}
    for c in real_contexts:
        products = {q: _dot(queries[q], contexts[c]) for q in real_queries}
        products = {q: product if product > 0 else 0.1 * product for q, product in products.items()}
        squared_norm = sum(product**2 for product in products.values())
        for q, product in products.items():
            normalised[q, c] = product / torch.sqrt(squared_norm) if squared_norm > 0 else product
    cosines = []
    for q in real_queries:
        attention = _softmax([inverse_temperature * normalised[q, c] for c in real_contexts])
        attended = sum(weight * contexts[c] for weight, c in zip(attention, real_contexts, strict=True))
        query, attended = l2_normalise(torch.stack([queries[q], attended]))
        cosines.append(_dot(query, attended))
    return _mean(cosines)


def laps_logits(
    tokens: Any, gain: Any, shift: Any, W1: Any, b1: Any, W2: Any, b2: Any, scale: Any = 1.0, eps: float = 1e-5
) -> Tensor:
    """LAPS (CVPR 2024): scale * (W2 GELU(W1 LayerNorm(x) + b1) + b2) per patch; exact (erf) GELU.

    `tokens` (Lv, D), `gain` and `shift` (D,) of the LayerNorm, `W1` (H, D), `b1` (H,), `W2` (M, H), `b2` (M,). Returns
    (Lv, M). The `eps` under the root of the variance is part of the form: variances of unit-length tokens are about 1 / D.
    """
    gain, shift, W1, b1, W2, b2 = _f64(gain), _f64(shift), _f64(W1), _f64(b1), _f64(W2), _f64(b2)
    rows = []
    for token in _f64(tokens):
        centred = token - sum(token) / len(token)
        token = gain * centred / torch.sqrt(_dot(centred, centred) / len(token) + eps) + shift
        hidden = []
        for weight, bias in zip(W1, b1, strict=True):
            x = _dot(weight, token) + bias
            hidden.append(x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))
        logits = [_dot(weight, torch.stack(hidden)) + bias for weight, bias in zip(W2, b2, strict=True)]
        rows.append(_f64(scale) * torch.stack(logits))
    return torch.stack(rows)


def laps_kept(words: Any, patches: Any, word_mask: Any = None, patch_mask: Any = None, keep_share: float = 0.5):
    """LAPS: (kept, dropped, scores): positions of patches, highest score first, and the score of each position.

    The score of a patch v is <v, g_v> + <v, g_t>, with the normalised means g_v of the real patches and g_t of the real
    words. ceil(keep_share * number of real patches) are kept, of equal scores the lower position. No gradient flows
    through a score. `keep_share` is the decimal as written: 0.07 of 100 are 7.
    """
    words, patches = _f64(words).detach(), _f64(patches).detach()
    real_words, real_patches = _real(word_mask, len(words)), _real(patch_mask, len(patches))
    centre = sum(patches[p] for p in real_patches) / len(real_patches)
    caption = sum(words[w] for w in real_words) / len(real_words)
    centre, caption = l2_normalise(torch.stack([centre, caption]))
    scores = {p: _dot(patches[p], centre) + _dot(patches[p], caption) for p in real_patches}
    ranked = sorted(real_patches, key=lambda p: (-scores[p], p))
    num_kept = math.ceil(Fraction(str(keep_share)) * len(real_patches))
    return ranked[:num_kept], ranked[num_kept:], scores


def laps_score(
    words: Any,
    patches: Any,
    logits: Any,
    word_mask: Any = None,
    patch_mask: Any = None,
    keep_share: float = 0.5,
) -> Tensor:
    """LAPS (CVPR 2024): the caption selects patches, those become M + 1 tokens, matched by eq. 7. Returns a scalar.

    Token m of M: the kept patches of `laps_kept`, weighted by the softmax of column m of `logits` (Lv, M) over them. The
    last one: the dropped patches, weighted by the softmax of their scores; 0 without a dropped patch. Each is
    L2-normalised, and zero stays zero.
    """
    words, patches, logits = _f64(words), _f64(patches), _f64(logits)
    kept, dropped, scores = laps_kept(words, patches, word_mask, patch_mask, keep_share)
    tokens = []
    for column in logits.unbind(1):
        weights = _softmax([column[p] for p in kept])
        tokens.append(sum(weight * patches[p] for weight, p in zip(weights, kept, strict=True)))
    weights = _softmax([scores[p] for p in dropped])
    tokens.append(sum((w * patches[p] for w, p in zip(weights, dropped, strict=True)), torch.zeros_like(patches[0])))
    return bidirectional_similarity(words, l2_normalise(torch.stack(tokens)), word_mask)


def score_all_pairs(
    pair_score: Callable[[Any, Any, Any, Any], Tensor],
    patch_embeds: Any,
    word_embeds: Any,
    word_mask: Any = None,
    patch_mask: Any = None,
) -> Tensor:
    """`pair_score(words, patches, word_mask, patch_mask)` for every image and caption. Returns (B, C).

    `patch_embeds` (B, Lv, D), `word_embeds` (C, Lt, D), masks (C, Lt) and (B, Lv); `pair_score` as in this section.
    """
    rows = []
    for i, patches in enumerate(patch_embeds):
        mask_i = None if patch_mask is None else patch_mask[i]
        row = []
        for t, words in enumerate(word_embeds):
            row.append(pair_score(words, patches, None if word_mask is None else word_mask[t], mask_i))
        rows.append(torch.stack(row))
    return torch.stack(rows)


# --- Losses (eq. 8-13) ---


def contrastive_hinge(scores: Any, positives: Any, margin: float, use_hard_negatives: bool = True) -> Tensor:
    """Eq. 8 with the hard negatives of VSE++: mean over positive pairs (i, c) of the two hinges of the pair.

    [margin - S_ic + N_i]+ + [margin - S_ic + N_c]+, N_i the highest caption that is not a positive of image i, N_c the
    highest image that is not a positive of caption c. Without hard negatives each hinge is averaged over all negatives
    of its query. A query without negatives contributes 0. `scores` (B, C), `positives` (B, C) bool. Returns a scalar
    >= 0. Raises ValueError without a positive pair.
    """
    scores = _f64(scores)
    num_images, num_captions = scores.shape

    def hinge(positive: Tensor, negatives: list[Tensor]) -> Tensor:
        if not negatives:
            return _f64(0.0)
        if use_hard_negatives:
            negatives = [max(negatives)]
        violations = [margin - positive + negative for negative in negatives]
        return _mean([violation if violation > 0 else violation * 0 for violation in violations])

    terms = []
    for i in range(num_images):
        for c in range(num_captions):
            if positives[i][c]:
                other_captions = [scores[i, other] for other in range(num_captions) if not positives[i][other]]
                other_images = [scores[other, c] for other in range(num_images) if not positives[other][c]]
                terms.append(hinge(scores[i, c], other_captions) + hinge(scores[i, c], other_images))
    if not terms:
        raise ValueError("`positives` marks no pair, so the mean over positive pairs is undefined.")
    return _mean(terms)


def reconstruction_loss(region_embeds: Any, patch_embeds: Any, patch_mask: Any = None) -> Tensor:
    """L_recon (eq. 8-13): mean over images and regions of || u_k - mean over real patches of v^_l ||^2, a scalar.

    `region_embeds` (B, K, D), `patch_embeds` (B, Lv, D) already times saliency, `patch_mask` (B, Lv).
    """
    region_embeds, patch_embeds = _f64(region_embeds), _f64(patch_embeds)
    distances = []
    for i in range(len(region_embeds)):
        real = _real(None if patch_mask is None else patch_mask[i], len(patch_embeds[i]))
        image_mean = sum(patch_embeds[i, position] for position in real) / len(real)
        for region in region_embeds[i]:
            distances.append(_dot(region - image_mean, region - image_mean))
    return _mean(distances)


def gaussian_kl(region_means: Any, region_log_vars: Any) -> Tensor:
    """L_KL (eq. 8-13): mean over images, regions and features of -1/2 (1 + log sigma^2 - mu^2 - sigma^2), a scalar.

    mu and sigma are those of tokens scaled from unit length to unit variance, by sqrt(D): KL(N(mu, sigma^2) || N(0, 1))
    per coordinate, >= 0. `region_means` and `region_log_vars` (B, K, D), before that scaling.
    """
    region_means, region_log_vars = _f64(region_means), _f64(region_log_vars)
    terms = []
    for image_means, image_log_vars in zip(region_means, region_log_vars, strict=True):
        for means, log_vars in zip(image_means, image_log_vars, strict=True):
            for mean, log_var in zip(means * len(means) ** 0.5, log_vars + math.log(len(log_vars)), strict=True):
                terms.append(-0.5 * (1 + log_var - mean**2 - torch.exp(log_var)))
    return _mean(terms)


def saliency_budget(saliency: Any, mask: Any, budget: float) -> Tensor:
    """Mean over images of the squared distance of the mean saliency of their patches from the budget, a scalar.

    `saliency` (B, Lv) in [0, 1], `mask` (B, Lv). The mean is that of the real tokens, 0 without any.
    """
    distances = []
    for i, values in enumerate(_f64(saliency)):
        real = [values[position] for position in _real(mask[i], len(values))]
        distances.append(((_mean(real) if real else torch.zeros(()).double()) - budget) ** 2)
    return _mean(distances)


def region_entropy(region_affinity: Any, patch_mask: Any = None) -> Tensor:
    """L_ent (eq. 8-13): mean over images of the image's mean over real patches and regions of -A_r log A_r, a scalar.

    0 log 0 = 0. Every image counts the same, however many real patches it has. `region_affinity` (B, Lv, K) in
    [0, 1], `patch_mask` (B, Lv). Range [0, 1 / e].
    """
    images = []
    for i, affinity in enumerate(_f64(region_affinity)):
        real = _real(None if patch_mask is None else patch_mask[i], len(affinity))
        values = [value for position in real for value in affinity[position]]
        images.append(_mean([-value * torch.log(value) if value > 0 else value * 0 for value in values]))
    return _mean(images)
