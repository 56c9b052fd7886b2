//! Domination, fronts, crowding, hypervolume: what NSGA-II sorts by (Deb et al. 2002), as pymoo 0.6.0.1 computes it.
//!
//! All objectives are minimised; all numbers are finite.

use std::cmp::Ordering;

/// Whether `a` is nowhere worse than `b` and somewhere better.
pub fn dominates(a: &[f64], b: &[f64]) -> bool {
    a.iter().zip(b).all(|(a, b)| a <= b) && a.iter().zip(b).any(|(a, b)| a < b)
}

/// The indices of the points in fronts: of the first nobody dominates one, of the second nobody but the first's, and so on.
/// Within a front they ascend.
pub fn fronts(points: &[&[f64]]) -> Vec<Vec<usize>> {
    let mut dominated_by = vec![0; points.len()];
    let mut dominated = vec![Vec::new(); points.len()];
    for (i, a) in points.iter().enumerate() {
        for (j, _) in points.iter().enumerate().filter(|(_, b)| dominates(a, b)) {
            dominated[i].push(j);
            dominated_by[j] += 1;
        }
    }
    let mut front = (0..points.len()).filter(|&i| dominated_by[i] == 0).collect::<Vec<_>>();
    let mut fronts = Vec::new();
    while !front.is_empty() {
        let mut next = Vec::new();
        for &j in front.iter().flat_map(|&i| &dominated[i]) {
            dominated_by[j] -= 1;
            if dominated_by[j] == 0 {
                next.push(j);
            }
        }
        next.sort_unstable();
        fronts.push(std::mem::replace(&mut front, next));
    }
    fronts
}

/// Of each point the mean over objectives of the distance between its neighbours, in parts of the objective's range;
/// infinite at the ends of an objective. A point that stands where an earlier one does has 0; of one or two points each
/// is an end.
pub fn crowding(points: &[&[f64]]) -> Vec<f64> {
    if points.len() <= 2 {
        return vec![f64::INFINITY; points.len()];
    }
    let unique = (0..points.len()).filter(|&i| !points[..i].contains(&points[i])).collect::<Vec<_>>();
    let objectives = points[0].len();
    let columns = (0..objectives).map(|o| unique.iter().map(|&i| points[i][o]).collect::<Vec<_>>());
    let mut crowding = vec![0.0; points.len()];
    for column in columns {
        for (&i, between) in unique.iter().zip(between_neighbours(&column)) {
            crowding[i] += between;
        }
    }
    crowding.into_iter().map(|sum| sum / objectives as f64).collect()
}

/// Of each value the distance from the next smaller to the next larger one, in parts of the range; infinite at the ends.
fn between_neighbours(values: &[f64]) -> Vec<f64> {
    let mut sorted = (0..values.len()).collect::<Vec<_>>();
    // Stable: of equal values the first stands first.
    sorted.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let ordered = sorted.iter().map(|&i| values[i]).collect::<Vec<_>>();
    let range = ordered.last().zip(ordered.first()).map_or(0.0, |(last, first)| last - first);
    // Where all are equal nothing is said.
    let mut between = vec![0.0; values.len()];
    for (place, &i) in sorted.iter().enumerate().filter(|_| range > 0.0) {
        between[i] = match (place.checked_sub(1), ordered.get(place + 1)) {
            (Some(before), Some(next)) => {
                (ordered[place] - ordered[before]) / range + (next - ordered[place]) / range
            }
            _ => f64::INFINITY,
        };
    }
    between
}

/// The area that points of two objectives dominate within `reference`, whose own coordinates are the worst that count.
pub fn hypervolume(points: &[[f64; 2]], reference: [f64; 2]) -> f64 {
    let inside = |p: &&[f64; 2]| p[0] < reference[0] && p[1] < reference[1];
    let mut sorted = points.iter().filter(inside).copied().collect::<Vec<_>>();
    sorted.sort_by(|a, b| a[0].total_cmp(&b[0]).then(a[1].total_cmp(&b[1])));
    let (mut area, mut least) = (0.0, reference[1]);
    for [x, y] in sorted {
        if y < least {
            area += (reference[0] - x) * (least - y);
            least = y;
        }
    }
    area
}

/// Larger crowding first.
pub(super) fn by_falling(crowding: &[f64]) -> impl Fn(&usize, &usize) -> Ordering {
    move |&a, &b| crowding[b].total_cmp(&crowding[a])
}
