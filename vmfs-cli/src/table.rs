//! Aligned tables for people.

/// How the cells of a column are aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    /// Numbers.
    Right,
}

/// A table with a heading and one line per row. The last column is not padded.
#[derive(Debug)]
pub(crate) struct Table {
    aligns: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Headings; one that begins with `>` is right-aligned.
    pub(crate) fn new(headings: &[&str]) -> Self {
        let align = |h: &&str| if h.starts_with('>') { Align::Right } else { Align::Left };
        let text = |h: &&str| h.trim_start_matches('>').to_owned();
        Self { aligns: headings.iter().map(align).collect(), rows: vec![headings.iter().map(text).collect()] }
    }

    /// Adds a row. Control characters in cells are shown as `?`: a name must not move the cursor.
    pub(crate) fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        let clean = |cell: T| {
            let cell: String = cell.into();
            cell.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
        };
        let row: Vec<String> = cells.into_iter().map(clean).collect();
        debug_assert_eq!(row.len(), self.aligns.len(), "a cell for every heading");
        self.rows.push(row);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.len() < 2
    }

    /// The lines, each with its line feed.
    pub(crate) fn render(&self) -> String {
        let width = |column: usize| {
            self.rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.aligns.len()).map(width).collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), align) in row.iter().zip(&widths).zip(&self.aligns) {
                let padding = " ".repeat(width - cell.chars().count());
                match align {
                    Align::Left => line.extend([cell.as_str(), &padding]),
                    Align::Right => line.extend([padding.as_str(), cell]),
                }
                line.push_str("  ");
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// `Key: value` lines with aligned values.
pub(crate) fn pairs(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(k, _)| k.len()).max().unwrap_or(0);
    pairs.iter().map(|(k, v)| format!("{k}:{}  {v}\n", " ".repeat(width - k.len()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_space() {
        let mut table = Table::new(&["IMAGE", ">SIZE", "STATE"]);
        assert!(table.is_empty());
        table.row(["a.img", "1 GiB", "ok"]);
        table.row(["é\u{1b}[2J", "512 MiB", ""]);
        assert_eq!(
            table.render(),
            "IMAGE     SIZE  STATE\n\
             a.img    1 GiB  ok\n\
             é?[2J  512 MiB\n"
        );
    }

    #[test]
    fn pairs_are_aligned() {
        assert_eq!(pairs(&[("id", "1".into()), ("owner", "b".into())]), "id:     1\nowner:  b\n");
    }
}
