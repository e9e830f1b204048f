"""Deformable attention on a CPU without gradients, about twice as fast as `grid_sample`.

It serves where numba is not installed.

Bilinear sampling is a weighted sum of four cells. So each output is a weighted sum of 4 * L * P
rows of the values, and `embedding_bag` adds up weighted rows in one call.

Shapes: B images, Q queries, S tokens, D channels, L levels, M heads, P points.
"""

import torch
import torch.nn.functional as F

from semidetr_lite.detectors.transformer import level_layout


def embedding_bag_attention(
    value: torch.Tensor,
    shapes: list[tuple[int, int]],
    locations: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The result of `deformable_attention`, (B, Q, D); same arguments. No gradients."""
    batch, tokens, heads, channels = value.shape
    queries = locations.shape[1]
    layout = level_layout(shapes, locations.device)
    width, height, first_token = layout.unbind(-1)  # (L,) each
    cells = locations * layout[:, None, :2] - 0.5  # integers at the centres of cells
    columns = _two_neighbours(cells[..., 0], width[:, None])
    rows = _two_neighbours(cells[..., 1], height[:, None])

    cell_indices, cell_factors = [], []
    for row, row_weight in rows:
        for column, column_weight in columns:
            cell_indices.append(row * width[:, None] + column + first_token[:, None])
            cell_factors.append(weights * row_weight * column_weight)
    indices = torch.stack(cell_indices, -1)  # (B, Q, M, L, P, 4), tokens of the image
    factors = torch.stack(cell_factors, -1)

    # rows of the values as a table (B * S * M, D/M)
    first_row = torch.arange(batch, dtype=torch.int32)[:, None] * tokens * heads
    first_row = first_row + torch.arange(heads, dtype=torch.int32)
    indices = indices * heads + first_row.view(batch, 1, heads, 1, 1, 1)

    output = F.embedding_bag(
        indices.flatten(3).flatten(0, 2),  # (B * Q * M, 4 * L * P)
        value.reshape(-1, channels),
        mode="sum",
        per_sample_weights=factors.flatten(3).flatten(0, 2),
    )
    return output.view(batch, queries, heads * channels)


def _two_neighbours(
    coordinates: torch.Tensor, size: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The cells below and above each coordinate along one axis, with their bilinear weights.

    Args:
        coordinates: (B, Q, M, L, P) in cells, integers at the centres.
        size: (L, 1) cells of each level along this axis.

    Returns:
        Two pairs (index, weight), (B, Q, M, L, P) each. Where a cell lies outside the map, the
        index is that of the border and the weight is 0.
    """
    below = coordinates.floor()
    above_weight = coordinates - below
    below = below.clamp(-2, 2**20).int()
    pairs = []
    for cell, weight in ((below, 1 - above_weight), (below + 1, above_weight)):
        inside = (cell >= 0) & (cell < size)
        pairs.append((cell.clamp(min=0).minimum(size - 1), weight * inside))
    return pairs
