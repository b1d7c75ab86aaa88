"""Slow twins of the policies beside ReST-KV and SnapKV: float64 loops over lists of positions, after docs/sources.md §2.

Two kinds: a score per entry of an Observation, and whole streams. A stream is one layer's q [H, T, D] and k [K, T, D] of T
tokens; its twin reads a prompt, then token after token, and yields what each KV head holds after every step.
"""

from __future__ import annotations

import math

import numpy as np

from twins import reference

# -- streams: the released algorithms, step by step


class Stream:
    """Random queries, keys and values of T tokens; attention among any of them."""

    def __init__(self, random, heads, kv_heads, tokens, head_dim, spread=2.0):
        self.q = random.normal(size=(heads, tokens, head_dim)) * spread
        self.k = random.normal(size=(kv_heads, tokens, head_dim))
        self.v = random.normal(size=(kv_heads, tokens, head_dim))
        self.scale = head_dim**-0.5
        self.group = heads // kv_heads

    def attention(self, head, query, held):
        """Softmax weights of one query over the positions `held` (those up to its own)."""
        seen = [p for p in held if p <= query]
        logits = [float(self.q[head, query] @ self.k[head // self.group, p]) * self.scale for p in seen]
        exps = [math.exp(x - max(logits)) for x in logits]
        return {p: e / sum(exps) for p, e in zip(seen, exps, strict=True)}


def best(held, value, count):
    """The `count` positions of largest value; of equal ones the older loses."""
    return sorted(held, key=lambda p: (value[p], p))[max(0, len(held) - count) :]


def h2o(stream, prompt, budget, recent):
    """Accumulated attention; the newest `recent` always stay (docs/sources.md §2.3, the authors'; the mean over a group)."""
    K, T = stream.k.shape[:2]
    held = [list(range(prompt)) for _ in range(K)]
    mass = [dict.fromkeys(range(T), 0.0) for _ in range(K)]

    def look(head, query):
        group = range(head * stream.group, (head + 1) * stream.group)
        for h in group:
            for p, weight in stream.attention(h, query, held[head]).items():
                mass[head][p] += weight / stream.group

    for head in range(K):
        for query in range(prompt):
            look(head, query)
    for step in range(prompt, T + 1):
        for head in range(K):
            if len(held[head]) > budget:
                newest = len(held[head]) - recent
                heavy = best(held[head][:newest], mass[head], budget - recent)
                held[head] = sorted(heavy) + held[head][newest:]
        yield [list(positions) for positions in held]
        if step < T:
            for head in range(K):
                held[head].append(step)
                look(head, step)


def tova(stream, prompt, budget):
    """Mean over all heads of the newest query's attention; one set for all KV heads (docs/sources.md §2.4)."""
    H, T = stream.q.shape[:2]
    held = list(range(prompt))
    for step in range(prompt, T + 1):
        if len(held) > budget:
            rows = [stream.attention(h, step - 1, held) for h in range(H)]
            held = sorted(best(held, {p: sum(row[p] for row in rows) / H for p in held}, budget))
        yield [held] * stream.k.shape[0]
        held = [*held, step]


def streamingllm(stream, prompt, budget, sinks):
    """The first `sinks` and the last budget - sinks (docs/sources.md §2.2)."""
    K, T = stream.k.shape[:2]
    held = list(range(prompt))
    for step in range(prompt, T + 1):
        if len(held) > budget:
            held = held[:sinks] + held[len(held) - (budget - sinks) :]
        yield [held] * K
        held = [*held, step]


class Ladders:
    """LaCache of one row, all layers, over slot indices as docs/sources.md §2.8 has them.

    `strange` is set by a call whose indices the released code could not keep apart or reach: then layers would differ.
    """

    def __init__(self, num_layers, cache, span, overlap, sinks):
        self.N, self.c, self.sinks = num_layers, cache, sinks
        self.before = 1 + math.ceil((num_layers - span) / (span - overlap))
        self.after = min(math.ceil(span / (span - overlap)), self.before)
        self.cursor, self.overflowed, self.strange = sinks, False, False

    def __call__(self, length):
        """Slots of a cache of `length` that each layer keeps, one list per layer."""
        if length <= self.c:
            return [list(range(length))] * self.N
        drop = self.before - self.after
        if not self.overflowed:
            self.c, self.overflowed = self.c + drop // 2, True
        excess = length - self.c
        room = self.c - self.cursor - self.N
        can = room // self.after * drop
        start_over = excess > can
        ladders = room // self.after if start_over else max(0, math.ceil(excess / drop))
        lines = [self.line(i, self.cursor, ladders, self.before, 1, length) for i in range(self.N)]
        self.cursor += ladders * self.after
        if start_over:
            left = excess - can
            per = (self.c - self.sinks - self.N) // self.after * drop
            stretch = math.ceil(left / per)
            before = self.before + (stretch - 1) * (self.before - 1)
            ladders = math.ceil(left / (before - self.after))
            size = len(lines[0])
            again = [self.line(i, self.sinks, ladders, before, stretch, size) for i in range(self.N)]
            flat = [slot for line in again for slot in line]
            self.strange = max(flat) >= size or self.sinks + ladders * before > size
            self.strange |= any(len(set(line)) < len(line) for line in again)
            lines = [[line[s] for s in kept if s < size] for line, kept in zip(lines, again, strict=True)]
            self.cursor = self.sinks + ladders * self.after
        return lines

    def line(self, layer, start, ladders, before, stretch, length):
        first = layer % (before - self.after + 1)
        rungs = [start + j * before + first + stretch * k for j in range(ladders) for k in range(self.after)]
        return [*range(start), *rungs, *range(start + ladders * before, length)]


# -- scores of an Observation


def scores(policy, obs, w_o_EHD=None, frequencies=None, factor=1.0):
    """What policy.score(obs) must give, -inf where there is no entry or none that will be seen again."""
    B, K, C = obs.pos.shape
    H, G = obs.q.shape[1], obs.q.shape[1] // K
    per_head = policy.granularity == "query"
    out = np.full((B, H if per_head else K, C), -math.inf)
    for b in range(B):
        heads = [reference.Head(obs, b, h) for h in range(H)]
        columns = {
            "keynorm": lambda b, h: keynorm(obs, b, h // G),
            "keydiff": lambda b, h: keydiff(obs, b, h // G),
            "streamingllm": lambda b, h: obs.pos[b, h // G].double().numpy(),
            "random": lambda b, h: random(policy, obs, b, h if per_head else h // G, h // G),
            "tova": lambda b, h: tova_line(obs, b, h // G, newest(obs, heads)),  # noqa: B023
            "caote": lambda b, h: caote(policy, obs, heads, h, w_o_EHD),  # noqa: B023
            "expected-attention": lambda b, h: expected(policy, obs, b, h, frequencies, factor),
            "compactor": lambda b, h: compactor(policy, obs, b, frequencies, factor)[h // G],
            "curdkv": lambda b, h: curdkv(policy, obs, b, h // G),
            "rkv": lambda b, h: rkv(policy, obs, b, h // G),
        }[policy.name]
        for x in range(out.shape[1]):
            members = [x] if per_head else range(x * G, (x + 1) * G)
            lines = np.array([columns(b, h) for h in members])
            line = lines.mean(0) if policy.gqa == "mean" else lines.max(0)
            head = heads[members[0]]
            for c in range(C):
                p = int(obs.pos[b, members[0] // G, c])
                gone = obs.sliding_window is not None and p <= head.newest + 1 - obs.sliding_window
                if c in head.columns and not gone:
                    out[b, x, c] = line[c]
    return out


def tova_line(obs, b, k_head, weights_HC):
    """The mean over all heads of the weight on each entry: the n-th oldest of one is the n-th of every other."""
    C = obs.pos.shape[-1]
    orders = [sorted(range(C), key=lambda c: int(obs.pos[b, k, c]) % 10**9) for k in range(obs.pos.shape[1])]
    G = len(weights_HC) // len(orders)
    line = np.zeros(C)
    for n in range(C):
        line[orders[k_head][n]] = np.mean([weights_HC[h][orders[h // G][n]] for h in range(len(weights_HC))])
    return line


def numbers(tensor):
    return tensor.double().numpy()


def keynorm(obs, b, k_head):
    return np.array([-math.sqrt(sum(float(x) ** 2 for x in key)) for key in numbers(obs.k[b, k_head])])


def keydiff(obs, b, k_head):
    """-cosine between a key and the mean of the normalised keys; 0 where that mean is 0."""
    keys = numbers(obs.k[b, k_head])
    units = [key / np.linalg.norm(key) for key, p in zip(keys, obs.pos[b, k_head].tolist(), strict=True) if p >= 0]
    anchor = sum(units, np.zeros(keys.shape[1])) / max(1, len(units))
    return np.array([-(key @ anchor) / np.linalg.norm(key) / (np.linalg.norm(anchor) or 1) for key in keys])


def mix(x):
    """The 32-bit finalizer of MurmurHash3, with plain integers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def random(policy, obs, b, head, k_head):
    """Three hashes, the top 24 bits of the last."""
    state = mix(policy.seed ^ mix(head * 4096 + obs.layer))
    return np.array([(mix(state ^ max(p, 0)) >> 8) / 2**24 for p in obs.pos[b, k_head].tolist()])


def newest(obs, heads):
    """[H, C]: the newest query's softmax weights."""
    out = np.zeros((len(heads), obs.pos.shape[-1]))
    for h, head in enumerate(heads):
        if head.attention:
            out[h, head.columns] = head.attention[-1]
    return out


def caote(policy, obs, heads, h, w_o_EHD):
    """Length of the change of one head's output when an entry is really deleted, for the newest query.

    Without the only entry it sees, its output is 0.
    """
    head, out = heads[h], np.zeros(obs.pos.shape[-1])
    if not head.attention:
        return out
    attention, everything = head.attention[-1], range(len(head.pos))
    whole = head.output(attention, everything)
    for i, c in enumerate(head.columns):
        rest = reference.without(attention, i) if attention[i] < sum(attention) else [0.0] * len(attention)
        change = head.output(rest, everything) - whole
        out[c] = np.linalg.norm(w_o_EHD[:, h].numpy() @ change if policy.output_weight else change)
    return out


def rotation(frequencies, position, factor=1.0):
    """RoPE as a matrix [D, D] that turns the pairs (i, i + D/2)."""
    half = len(frequencies)
    matrix = np.zeros((2 * half, 2 * half))
    for i, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency) * factor, math.sin(position * frequency) * factor
        matrix[i, i], matrix[i, i + half] = cos, -sin
        matrix[i + half, i], matrix[i + half, i + half] = sin, cos
    return matrix


def expected(policy, obs, b, h, frequencies, factor):
    """Expected attention of one query head, times the values' norms, [C] (bench/speed/peers/README.md)."""
    k_head = h // (obs.q.shape[1] // obs.k.shape[1])
    positions = [p for p in obs.q_pos[b].tolist() if p >= policy.sinks]
    rows = [w for w, p in enumerate(obs.q_pos[b].tolist()) if p >= policy.sinks]
    D = obs.q.shape[-1]
    plain = [
        np.linalg.inv(rotation(frequencies, p, factor)) @ numbers(obs.q[b, h, w])
        for w, p in zip(rows, positions, strict=True)
    ]
    mu = sum(plain, np.zeros(D)) / max(1, len(plain))
    sigma = sum((np.outer(x - mu, x - mu) for x in plain), np.zeros((D, D))) / max(1, len(plain))
    last = int(obs.q_pos[b, -1])
    mean_turn = sum(rotation(frequencies, last + f, factor) for f in range(1, policy.future + 1)) / policy.future
    mu, sigma = mean_turn @ mu, mean_turn @ sigma @ mean_turn.T
    entries = [
        c
        for c, p in enumerate(obs.pos[b, k_head].tolist())
        if p >= policy.sinks and (obs.keep is None or bool(obs.keep[b, h, c]))
    ]
    logits = {}
    for c in entries:
        key = numbers(obs.k[b, k_head, c])
        logits[c] = obs.softmax_scale * mu @ key
        if policy.covariance:
            logits[c] += obs.softmax_scale**2 * key @ sigma @ key / 2
    out = np.zeros(obs.pos.shape[-1])
    for c in entries:
        out[c] = 1 / sum(math.exp(logits[j] - logits[c]) for j in entries)
    if policy.value_norm:
        out = (out + policy.epsilon) * np.linalg.norm(numbers(obs.v[b, k_head]), axis=-1)
    return out


def compactor(policy, obs, b, frequencies, factor):
    """[K, C]: leverage and chunk attention, each as z-scores over the layer (arXiv 2507.08143, kvpress 0.5.5)."""
    K, C = obs.pos.shape[1:]
    newest = int(obs.q_pos[b, -1])
    pos = obs.pos[b].tolist()
    counted = []
    for line in pos:
        places = {p: c for c, p in enumerate(line) if p >= 0 and policy.sinks <= p <= newest - policy.window}
        counted.append([places[p] for p in sorted(places)])
    leverage: dict[tuple[int, int], float] = {}
    attention: dict[tuple[int, int], float] = {}
    for k in range(K):
        if not counted[k]:
            continue
        plain = [np.linalg.inv(rotation(frequencies, pos[k][c], factor)) @ numbers(obs.k[b, k, c]) for c in counted[k]]
        off = (np.array(plain) - np.mean(plain, axis=0)) @ sketch(policy, obs, k)
        inverse = np.linalg.inv(off.T @ off + 0.01 * np.eye(off.shape[1]))
        leverage |= {(k, c): float(x @ inverse @ x) for c, x in zip(counted[k], off, strict=True)}
        attention |= chunk_attention(policy, obs, b, k, counted[k])
    share = 1 - policy.budget * K / max(1, sum(p >= 0 for line in pos for p in line))
    blending = min(1.0, max(0.0, share)) if policy.blending is None else policy.blending
    out = np.zeros((K, C))
    for weight, found in ((blending, leverage), (1.0, attention)):
        values = np.array(list(found.values()))
        deviation = max(1e-6, values.std(ddof=1) if len(values) > 1 else 0.0)
        for (k, c), value in found.items():
            out[k, c] += weight * (value - values.mean()) / deviation
    return out


def chunk_attention(policy, obs, b, k, columns):
    """{(k, c): ...} of the chunks of a head's entries (columns, oldest first) that an observed query lies in."""
    found, G = {}, obs.q.shape[1] // obs.k.shape[1]
    rows = {p: w for w, p in enumerate(obs.q_pos[b].tolist()) if p >= 0}
    line = [0.0] * len(columns)
    known: list[int] = []
    for start in range(0, len(columns), policy.chunk_size):
        chunk = columns[start : start + policy.chunk_size]
        asking = [rows[p] for p in (int(obs.pos[b, k, c]) for c in chunk) if p in rows]
        if not asking:
            continue
        known += range(start, start + len(chunk))
        keys = numbers(obs.k[b, k, chunk])
        for h in range(k * G, (k + 1) * G):
            for w in asking:
                logits = keys @ numbers(obs.q[b, h, w])
                exps = np.exp(logits - logits.max())
                for i, weight in enumerate(exps / exps.sum()):
                    line[start + i] += weight / G * len(chunk) / len(asking)
    for i, c in enumerate(columns):
        line[i] *= float(np.linalg.norm(numbers(obs.v[b, k, c])))
    for i in known:
        found[k, columns[i]] = sum(line[max(0, i - 1) : i + 2]) / 3
    return found


def sketch(policy, obs, k):
    """[D, S] normal numbers by Box and Muller, of hashes; divided by the root of S."""
    return normal(policy.seed, obs.layer, k, obs.k.shape[-1], policy.sketch_dimension)


def normal(seed, layer, k, D, S):
    state = mix(seed ^ mix(k * 4096 + layer))
    out = np.zeros((D, S))
    for i in range(D * S):
        radius, turn = ((mix(state ^ (2 * i + j)) >> 8) / 2**24 for j in range(2))
        out[i // S, i % S] = math.sqrt(-2 * math.log(radius + 2**-25)) * math.cos(2 * math.pi * turn)
    return out / math.sqrt(S)


def oldest_first(obs, b, k):
    """Columns of a head's entries in order of position."""
    places = {p: c for c, p in enumerate(obs.pos[b, k].tolist()) if p >= 0}
    return [places[p] for p in sorted(places)]


def curdkv(policy, obs, b, k):
    """Squares over the sum of their 16 neighbours' (kvpress 0.5.5, bench/speed/peers/README.md)."""
    columns, out = oldest_first(obs, b, k), np.zeros(obs.pos.shape[-1])
    found = []
    for side in (obs.k, obs.v):
        rows = numbers(side[b, k, columns])
        if policy.projection is not None:
            rows = rows @ normal(policy.seed, obs.layer, 0, rows.shape[-1], policy.projection)
        squares = [float(row @ row) for row in rows]
        if policy.neighbours is not None:
            groups = [squares[i : i + policy.neighbours] for i in range(0, len(squares), policy.neighbours)]
            squares = [x / sum(group) for group in groups for x in group]
        found.append(squares)
    both = {
        "product": lambda x, y: x * y,
        "key": lambda x, y: x,
        "value": lambda x, y: y,
        "mean": lambda x, y: (x + y) / 2,
    }
    values = [both[policy.leverage](x, y) for x, y in zip(*found, strict=True)]
    out[columns] = np.array(values) / sum(values) if values else []
    return out


def rkv(policy, obs, b, k):
    """The authors' class, entry by entry (docs/sources.md §2.10)."""
    columns, out, G = oldest_first(obs, b, k), np.zeros(obs.pos.shape[-1]), obs.q.shape[1] // obs.k.shape[1]
    keys, positions = numbers(obs.k[b, k, columns]), [int(obs.pos[b, k, c]) for c in columns]
    rows = [w for w, p in enumerate(obs.q_pos[b].tolist()) if p >= 0]
    oldest = int(obs.q_pos[b, rows[0]]) if rows else 0
    past = [i for i, p in enumerate(positions) if p < oldest]
    attention = np.zeros(len(columns))
    for w in rows:
        seen = [
            i for i in past if obs.sliding_window is None or positions[i] > int(obs.q_pos[b, w]) - obs.sliding_window
        ]
        logits = np.array([[float(keys[i] @ numbers(obs.q[b, h, w])) for i in seen] for h in range(k * G, (k + 1) * G)])
        logits = logits * obs.softmax_scale
        if obs.softcap is not None:
            logits = obs.softcap * np.tanh(logits / obs.softcap)
        if seen:
            exps = np.exp(logits.max(0))
            attention[seen] += exps / exps.sum() / len(rows)
    half = policy.kernel_size // 2
    pooled = {i: max(attention[j] for j in past if abs(i - j) <= half) for i in past}

    length = len(columns)
    cosines = np.zeros((length, length))
    for i in range(length):
        for j in range(length):
            if i != j:
                sizes = (np.linalg.norm(keys[i]) + 1e-8) * (np.linalg.norm(keys[j]) + 1e-8)
                cosines[i, j] = keys[i] @ keys[j] / sizes
        similar = [j for j in range(length) if cosines[i, j] > policy.threshold]
        cosines[i, max(similar, default=0)] = 0.0
    means = np.exp(cosines.mean(0)) if length else np.zeros(0)
    for i, c in enumerate(columns):
        out[c] = policy.mix_lambda * pooled.get(i, 0.0) - (1 - policy.mix_lambda) * means[i] / means.sum()
    return out
