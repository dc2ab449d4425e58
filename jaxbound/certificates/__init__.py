"""From bounds to statements: margins, certificates of data sets, radii, attacks, properties, records of long runs."""
