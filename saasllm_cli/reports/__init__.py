"""Reports of a period for people: what they say, their charts, and the page. Knows no terminal."""
