"""Networks of sequences and graphs, a few units wide: recurrent ones and transformers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from architecture_parts import Net, architecture, images, parameter, tokens
from torch import nn


@architecture
def lstm_language_model():
    def forward(net, x):
        return net.head(net.rnn(net.embedding(x))[0])

    rnn = nn.LSTM(4, 5, 2, batch_first=True)
    return Net(forward, embedding=nn.Embedding(9, 4), rnn=rnn, head=nn.Linear(5, 9)), tokens(2, 3)


@architecture
def gru_with_time_first():
    def forward(net, x):
        outputs, h = net.rnn(x.transpose(0, 1))
        return net.head(torch.cat([h[0], h[1]], -1)) + net.head(outputs.mean(0))

    rnn = nn.GRU(4, 3, bidirectional=True)
    return Net(forward, rnn=rnn, head=nn.Linear(6, 2)), torch.randn(3, 4, 4)


@architecture
def graph_convolution():
    def forward(net, x, adjacency):
        return torch.bmm(adjacency, F.relu(adjacency @ net.first(x)) @ net.second).mean(1)

    inputs = torch.randn(3, 5, 4), torch.rand(3, 5, 5)
    return Net(forward, first=nn.Linear(4, 6), second=parameter(6, 2)), inputs


@architecture
def transformer_encoder():
    def forward(net, x):
        return net.head(net.encoder(x, mask=net.mask)).flatten(1)

    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    return Net(forward, encoder=encoder, head=nn.Linear(6, 2), mask=mask), torch.randn(3, 4, 6)


@architecture
def transformer_with_time_first():
    def forward(net, x):
        return net.head(net.encoder(x.transpose(0, 1))[0])

    layer = nn.TransformerEncoderLayer(6, 2, 8)
    return Net(forward, encoder=layer, head=nn.Linear(6, 2)), torch.randn(3, 4, 6)


@architecture
def transformer_with_padding():
    def forward(net, x):
        padding = x == 0
        h = net.encoder(net.embedding(x), src_key_padding_mask=padding)
        h = h.masked_fill(padding[..., None], 0.0)
        return net.head(h.sum(1) / (~padding).sum(1, keepdim=True))

    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    x = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [1, 2, 3, 4]])
    embedding = nn.Embedding(9, 6, padding_idx=0)
    return Net(forward, encoder=layer, embedding=embedding, head=nn.Linear(6, 2)), x


@architecture
def encoder_and_decoder():
    def forward(net, source, target):
        return net.head(net.transformer(source, target)).flatten(1)

    transformer = nn.Transformer(6, 2, 1, 1, 8, batch_first=True)
    inputs = torch.randn(3, 3, 6), torch.randn(3, 2, 6)
    return Net(forward, transformer=transformer, head=nn.Linear(6, 2)), inputs


@architecture
def llama():
    """Rotary embeddings, root-mean-square norms, a gated MLP and tied embeddings."""

    def turned(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)

    def forward(net, ids):
        x = net.tokens(ids)
        n, t, c = x.shape
        angles = torch.outer(torch.arange(t, device=x.device).to(x.dtype), net.frequencies)
        cos, sin = (f(torch.cat((angles, angles), -1))[None, None] for f in (torch.cos, torch.sin))
        q, k, v = (layer(net.norm(x)).view(n, t, 2, -1).transpose(1, 2) for layer in net.qkv)
        q, k = q * cos + turned(q) * sin, k * cos + turned(k) * sin
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + net.out(h.transpose(1, 2).contiguous().view(n, t, c))
        x = x + net.down(F.silu(net.gate(x)) * net.up(x))
        return F.linear(x, net.tokens.weight)[:, -1, :]

    def linear(i, o):
        return nn.Linear(i, o, bias=False)

    return Net(
        forward, tokens=nn.Embedding(9, 8), norm=nn.RMSNorm(8), out=linear(8, 8), up=linear(8, 6),
        qkv=nn.ModuleList([linear(8, 8) for _ in range(3)]), gate=linear(8, 6), down=linear(6, 8),
        frequencies=torch.tensor([1.0, 0.1]),
    ), tokens()  # fmt: skip


@architecture
def nano_gpt():
    def forward(net, ids):
        b, t = ids.size()
        x = net.tokens(ids) + net.places(torch.arange(0, t, device=ids.device))
        q, k, v = (p.view(b, t, 2, 3).transpose(1, 2) for p in net.qkv(x).split(6, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(net.past[:, :, :t, :t] == 0, float("-inf"))
        h = (net.drop(F.softmax(scores, dim=-1)) @ v).transpose(1, 2).contiguous().view(b, t, 6)
        return net.head((x + h)[:, [-1], :])

    return Net(
        forward, tokens=nn.Embedding(9, 6), places=nn.Embedding(6, 6), qkv=nn.Linear(6, 18),
        head=nn.Linear(6, 9), drop=nn.Dropout(0.1), past=torch.ones(1, 1, 6, 6).tril(),
    ), tokens()  # fmt: skip


@architecture
def positions_of_each_example():
    def forward(net, ids):
        places = torch.arange(ids.size(1), device=ids.device).unsqueeze(0).expand(ids.size(0), -1)
        return net.head(net.tokens(ids) + net.places(places)).mean(1)

    parts = {"tokens": nn.Embedding(9, 6), "places": nn.Embedding(6, 6), "head": nn.Linear(6, 2)}
    return Net(forward, **parts), tokens()


@architecture
def shifted_windows():
    """Swin: windows join the batch, and every one adds the same bias that it looks up."""

    def forward(net, x):
        x = torch.roll(net.patches(x).permute(0, 2, 3, 1), (-1, -1), (1, 2))
        b, h, w, c = x.shape
        win = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = net.qkv(win).reshape(-1, 4, 3, 2, 2).permute(2, 0, 3, 1, 4)
        bias = net.table[net.index.view(-1)].view(4, 4, 2).permute(2, 0, 1)
        y = ((q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1) @ v).transpose(1, 2)
        y = y.reshape(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return net.head((x + y).flatten(1, 2).mean(1))

    return Net(
        forward, patches=nn.Conv2d(3, 4, 2, 2), qkv=nn.Linear(4, 12), table=parameter(9, 2),
        head=nn.Linear(4, 2), index=torch.randint(0, 9, (4, 4)),
    ), images()  # fmt: skip
