//! Columns of text, readable without colour.
//!
//! Owns alignment. Columns whose cells are all numbers are aligned to the right.

/// Lines of aligned columns, two spaces apart, with the headers above; no trailing spaces.
pub(crate) fn table<const N: usize>(headers: [&str; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([headers[column].chars().count()]).max().unwrap_or(0)
    };
    let is_number = |cell: &String| {
        cell.starts_with(|c: char| c.is_ascii_digit())
            && cell.chars().all(|c| c.is_ascii_digit() || ".,%- ".contains(c))
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let to_right: [bool; N] = std::array::from_fn(|column| {
        !rows.is_empty() && rows.iter().all(|row| row[column] == "-" || is_number(&row[column]))
    });
    let line = |cells: [&str; N]| {
        let mut line = String::new();
        for (column, cell) in cells.into_iter().enumerate() {
            let pad = " ".repeat(widths[column] - cell.chars().count());
            let padded =
                if to_right[column] { format!("{pad}{cell}") } else { format!("{cell}{pad}") };
            line.push_str(if column == 0 { "" } else { "  " });
            line.push_str(&padded);
        }
        format!("{}\n", line.trim_end())
    };
    let mut text = line(headers);
    for row in rows {
        text.push_str(&line(std::array::from_fn(|column| row[column].as_str())));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_right_and_text_goes_left() {
        let rows = [
            ["a".to_owned(), "1".to_owned(), "x".to_owned()],
            ["λλλ".to_owned(), "-".to_owned(), "1".to_owned()],
        ];
        let expected = "name  n  any\na     1  x\nλλλ   -  1\n";
        assert_eq!(table(["name", "n", "any"], &rows), expected);
        let rows = [["10".to_owned(), String::new()], ["9.5".to_owned(), String::new()]];
        assert_eq!(table(["n", "x"], &rows), "  n  x\n 10\n9.5\n");
        assert_eq!(table(["n", "x"], &[]), "n  x\n");
    }
}
