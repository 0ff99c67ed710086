// Figures in words for people.

const scaled = (value, units) => {
  const index = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(Math.max(value, 1)) / 3)));
  const number = value / 1000 ** index;
  return `${number >= 100 || index === 0 ? Math.round(number) : number.toFixed(1)} ${units[index]}`;
};

export const bytes = (value) => scaled(value, ["B", "kB", "MB", "GB", "TB"]);
export const perSecond = (value) => `${bytes(value)}/s`;

/** A time in seconds, as ms or µs where that is shorter. */
export function time(value) {
  if (value >= 1) return `${value.toFixed(1)} s`;
  return value >= 0.001 ? `${(value * 1e3).toFixed(value < 0.1 ? 1 : 0)} ms` : `${Math.round(value * 1e6)} µs`;
}

export const many = (count, one, more = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : more}`;
